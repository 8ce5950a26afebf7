"""The runs of one cell of a grid, which differ in what is tried alone: learning rate, weight decay and seed.

Making a run builds its layers to check them, ten milliseconds each, and a grid has thousands. A model is the same in
every trial, so that a cell is made once and copied; the values of the trials are checked on one cell of all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from lrm_recall.rows import plain

SWEPT = ("learning_rate", "weight_decay")  # the best of them counts; seeds are repetitions

Run = TypeVar("Run")


def cell_of(config: Mapping[str, Any]) -> str:
    """What a run, given by its fields or those of its row, has in common with the others of its cell; as text."""
    return repr(sorted((name, value) for name, value in plain(config).items() if name not in (*SWEPT, "seed")))


def check_trials(run: Run, trials: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError unless the run can be with the values of every trial in the place of its own."""
    for trial in trials:
        replace(run, **trial)


def at(run: Run, trial: Mapping[str, Any]) -> Run:
    """A copy of a run with the values of a trial, which `check_trials` has seen."""
    other = copy.copy(run)
    for name, value in trial.items():
        object.__setattr__(other, name, value)  # of a frozen dataclass
    return other
