"""Tests that need a browser. A package, so that its conftest does not stand in the way of tests/conftest.py."""
