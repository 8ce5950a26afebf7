"""The one error of the data layer."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be had or used: one line that names what, why, and what to do. Nothing half-written stays."""
