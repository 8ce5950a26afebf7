"""Sweeping learning rates without waste: a model that is solved at one rate is not trained at the next.

Rates are tried in the order in which they are given, each with the weight decays in theirs (MAD sweeps both, MQAR the
rate alone). A cell (all runs that differ in nothing but learning rate, weight decay and seed) leaves the sweep once
every seed of it reached `target_accuracy` on the validation set: no other rate could be chosen over that one by more
than what is left to the target. `lrm_recall.train.select` then picks among those tried.

Cells run side by side, the rates of a cell one after another. The workers are started once for all rates: on a GPU
each has libraries to import and kernels to compile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lrm_recall.execution import dask_client, in_one_process
from lrm_recall.results import ResultStore, Row
from lrm_recall.rows import plain
from lrm_recall.sweep import Experiment, plan_sweep, run_sweep
from lrm_recall.train.synthetic import MQARRun

_TRIED = ("learning_rate", "weight_decay")


def sweep_rates(
    runs: Sequence[MQARRun],
    experiment: Experiment,
    store: ResultStore,
    *,
    workers: int | str = 1,
    device: str = "cpu",
    retry_failed: bool = False,
    fresh: bool = False,
    **options: Any,
) -> list[Row]:
    """`run_sweep` rate by rate; the row of every run that was asked of the store, in that order.

    Args:
        runs: as `mqar_runs` or `mad_runs` makes them; their learning rates and weight decays, in order of first
            appearance, are the order of trial.
        experiment, store, retry_failed, fresh, options: as for `lrm_recall.sweep.run_sweep`.
        workers: runs at a time: processes on a CPU, threads of one process for each GPU; or a scheduler's address.
        device: where the runs work, as for `lrm_recall.execution.dask_client`.
    """
    rows: list[Row] = []
    again = {"retry_failed": retry_failed, "fresh": fresh}
    started = isinstance(workers, str) or in_one_process(workers, device)  # nothing is left to start
    with contextlib.ExitStack() as stack:
        for trial in dict.fromkeys(_trial(asdict(run)) for run in runs):
            waiting = unsolved(runs, rows)
            todo = [run for run in runs if _trial(asdict(run)) == trial and _cell(asdict(run)) in waiting]
            if not started and (missing := plan_sweep(todo, experiment, store, **again).missing):
                client = stack.enter_context(dask_client(min(workers, len(missing)), device))
                started, workers = True, client.scheduler.address
            if todo:
                rows += run_sweep(todo, experiment, store, workers=workers, **again, **options)
    return rows


def unsolved(runs: Sequence[MQARRun], rows: Sequence[Row]) -> set[str]:
    """The cells of `runs` that no trial among `rows` has solved for every seed."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(_cell(asdict(run)), set()).add(run.seed)
    done: dict[tuple[str, tuple[float, ...]], set[int]] = {}
    for row in rows:
        target = row["config"]["target_accuracy"]
        if row["status"] == "ok" and target is not None and row["metrics"]["valid_accuracy"] >= target:
            done.setdefault((_cell(row["config"]), _trial(row["config"])), set()).add(row["seed"])
    solved = {cell for (cell, _), reached in done.items() if reached >= seeds.get(cell, set())}
    return set(seeds) - solved


def _cell(config: dict[str, Any]) -> str:
    """What the runs of a cell have in common, as text."""
    return repr(sorted((name, value) for name, value in plain(config).items()
                       if name not in (*_TRIED, "seed")))


def _trial(config: dict[str, Any]) -> tuple[float, ...]:
    """What is tried in a run of the cell."""
    return tuple(config[name] for name in _TRIED)
