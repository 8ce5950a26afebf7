"""Rows of measurements that cannot be made here: those of another device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from lrm_recall.efficiency.run import EfficiencyRun
from lrm_recall.results import ResultStore
from lrm_recall.rows import Row, plain


def stored_rows(runs: Sequence[EfficiencyRun], store: ResultStore) -> list[Row]:
    """The latest row of each run, of whichever version of the code; runs without one are left out.

    A sweep would measure again what the code has changed since; on another machine that is not to be had.
    """
    latest: dict[str, Row] = {}
    for row in sorted(store.rows(), key=lambda row: row["created"]):
        latest[repr(row["config"])] = row
    configs = (repr(plain(asdict(run))) for run in runs)
    return [latest[config] for config in configs if config in latest]
