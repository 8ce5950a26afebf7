"""Sweeping learning rates without waste: a model that is solved at one rate is not trained at the next.

Rates are tried in the order in which they are given, each with the weight decays in theirs (MAD sweeps both, MQAR the
rate alone). A cell (all runs that differ in nothing but learning rate, weight decay and seed) leaves the sweep once
every seed of it reached `target_accuracy` on the validation set: no other rate could be chosen over that one by more
than what is left to the target. `lrm_recall.train.select` then picks among those tried.

Cells run side by side and none waits for another: only the rates of a cell come one after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lrm_recall.execution import dask_client, in_one_process
from lrm_recall.results import ResultStore, Row
from lrm_recall.sweep import Experiment, Plan, plan_sweep, run_sweep
from lrm_recall.train.synthetic import MQARRun
from lrm_recall.train.trials import SWEPT, cell_of


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
    """`run_sweep`, each run in its turn; the row of every run that was needed, in that order.

    Args:
        runs: as `mqar_runs` or `mad_runs` makes them; their learning rates and weight decays, in order of first
            appearance, are the order of trial.
        experiment, store, retry_failed, fresh, options: as for `lrm_recall.sweep.run_sweep`.
        workers: runs at a time: processes on a CPU, threads of one process for each GPU; or a scheduler's address.
        device: where the runs work, as for `lrm_recall.execution.dask_client`.
    """
    again = {"retry_failed": retry_failed, "fresh": fresh}
    plan = plan_sweep(runs, experiment, store, **again)
    turns = RateTurns.so_far(plan, store)
    needed = [key for key in plan.missing if turns(key) is not None]
    solved = set(plan.missing) - set(needed)
    asked = [run for key, run in plan.specs.items() if key not in solved]
    with contextlib.ExitStack() as stack:
        if needed and not isinstance(workers, str) and not in_one_process(workers, device):
            workers = min(workers, turns.most_at_once(needed))
            workers = stack.enter_context(dask_client(workers, device)).scheduler.address
        return run_sweep(asked, experiment, store, workers=workers, turns=turns, **again, **options)


def plan_rates(
    runs: Sequence[MQARRun], experiment: Experiment, store: ResultStore, *, retry_failed: bool = False
) -> Plan:
    """`plan_sweep` without the runs of a cell that a learning rate has solved already; arguments as `sweep_rates`."""
    plan = plan_sweep(runs, experiment, store, retry_failed=retry_failed)
    turns, done = RateTurns.so_far(plan, store), set(plan.stored)
    return plan.only([key for key in plan.specs if key in done or turns(key) is not None])


class RateTurns:
    """Whose turn it is: the `turns` of a sweep over rates.

    Args:
        runs: every run of the sweep by its key.
    """

    def __init__(self, runs: Mapping[str, MQARRun]) -> None:
        self._places = {key: _place(asdict(run)) for key, run in runs.items()}  # cell, trial, seed
        self._trials = list(dict.fromkeys(trial for _, trial, _ in self._places.values()))
        self._asked: dict[tuple[str, tuple], set[int]] = {}  # seeds, by cell and trial
        self._seeds: dict[str, set[int]] = {}
        for cell, trial, seed in self._places.values():
            self._asked.setdefault((cell, trial), set()).add(seed)
            self._seeds.setdefault(cell, set()).add(seed)
        self._ended: dict[tuple[str, tuple], set[int]] = {}
        self._reached: dict[tuple[str, tuple], set[int]] = {}
        self._solved: set[str] = set()

    @classmethod
    def so_far(cls, plan: Plan, store: ResultStore) -> RateTurns:
        """The turns of a plan's runs, those that it does not count as missing done."""
        turns, missing = cls(plan.specs), set(plan.missing)
        for row in [*store.failures(), *store.rows()]:
            if row["key"] not in missing:
                turns.note(row)
        return turns

    def __call__(self, key: str) -> bool | None:
        """Whether the run may be done now; None if it need not be, as its cell is solved."""
        cell, trial, _ = self._places[key]
        if cell in self._solved:
            return None
        before = self._trials[: self._trials.index(trial)]
        return all(self._asked.get((cell, each), set()) <= self._ended.get((cell, each), set()) for each in before)

    def rank(self, key: str) -> int:
        """The first trial of every cell before the second of any: a cell tells something after one."""
        return self._trials.index(self._places[key][1])

    def most_at_once(self, keys: Iterable[str]) -> int:
        """How many of these runs can be under way together."""
        places = (self._places[key] for key in keys)
        return len({(cell, seed) for cell, _, seed in places})

    def note(self, row: Row) -> None:
        """Take notice of a row; those of other sweeps say nothing."""
        if row["key"] not in self._places:
            return
        cell, trial, seed = self._places[row["key"]]
        self._ended.setdefault((cell, trial), set()).add(seed)
        target = row["config"]["target_accuracy"]
        if row["status"] == "ok" and target is not None and row["metrics"]["valid_accuracy"] >= target:
            reached = self._reached.setdefault((cell, trial), set())
            reached.add(seed)
            if reached >= self._seeds[cell]:
                self._solved.add(cell)


def _place(config: dict[str, Any]) -> tuple[str, tuple[float, ...], int]:
    """The cell of a run, what is tried in this one, its seed."""
    return cell_of(config), tuple(config[name] for name in SWEPT), config["seed"]
