"""Rows of measurements that cannot be made here: those of another device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lrm_recall.efficiency.run import EfficiencyRun
from lrm_recall.results import ResultStore
from lrm_recall.rows import Row, plain


def stored_rows(runs: Sequence[EfficiencyRun], store: ResultStore) -> list[Row]:
    """The latest row of each run, of any version of the code that had these fields; runs without one are left out.

    A sweep would measure again what the code has changed since; on another machine that is not to be had.
    """
    latest: dict[str, Row] = {}
    for row in sorted(store.rows(), key=lambda row: row["created"]):
        latest[_text(row["config"])] = row
    configs = (_text(plain(asdict(run))) for run in runs)
    return [latest[config] for config in configs if config in latest]


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)
