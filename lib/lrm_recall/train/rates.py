"""Sweeping learning rates without waste: a model that is solved at one rate is not trained at the next.

Rates are tried in the order in which they are given. A cell (all runs that differ in nothing but learning rate and
seed) leaves the sweep once every seed of it reached `target_accuracy` on the validation set: no other rate could be
chosen over that one by more than what is left to the target. `lrm_recall.train.select` then picks among those tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lrm_recall.results import ResultStore, Row
from lrm_recall.rows import plain
from lrm_recall.sweep import Experiment, run_sweep
from lrm_recall.train.synthetic import MQARRun


def sweep_rates(
    runs: Sequence[MQARRun], experiment: Experiment, store: ResultStore, **options: Any
) -> list[Row]:
    """`run_sweep` rate by rate; the row of every run that was asked of the store, in that order.

    Args:
        runs: as `mqar_runs` makes them; their learning rates in order of first appearance are the order of trial.
        experiment, store, options: as for `lrm_recall.sweep.run_sweep`.
    """
    rows: list[Row] = []
    for rate in dict.fromkeys(run.learning_rate for run in runs):
        waiting = unsolved(runs, rows)
        todo = [run for run in runs if run.learning_rate == rate and _cell(asdict(run)) in waiting]
        if todo:
            rows += run_sweep(todo, experiment, store, **options)
    return rows


def unsolved(runs: Sequence[MQARRun], rows: Sequence[Row]) -> set[str]:
    """The cells of `runs` that no learning rate among `rows` has solved for every seed."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(_cell(asdict(run)), set()).add(run.seed)
    done: dict[tuple[str, float], set[int]] = {}
    for row in rows:
        target = row["config"]["target_accuracy"]
        if row["status"] == "ok" and target is not None and row["metrics"]["valid_accuracy"] >= target:
            done.setdefault((_cell(row["config"]), row["config"]["learning_rate"]), set()).add(row["seed"])
    solved = {cell for (cell, _), reached in done.items() if reached >= seeds.get(cell, set())}
    return set(seeds) - solved


def _cell(config: dict[str, Any]) -> str:
    """What the runs of a cell have in common, as text."""
    return repr(sorted((name, value) for name, value in plain(config).items()
                       if name not in ("learning_rate", "seed")))
