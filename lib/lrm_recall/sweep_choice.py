"""Which of the runs that a notebook asks for a sweep takes on: by the values of their fields, and by machine.

Runs are dataclasses with a `variant`, in lists by the name of their experiment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lrm_recall.options import did_you_mean
from lrm_recall.sweep import Experiment, shard_of
from lrm_recall.train.trials import cell_of


def condition(word: str) -> tuple[str, Any]:
    """KEY=VALUE of the command line, the value read as YAML.

    Raises:
        ValueError: it is not of this form.
    """
    key, equals, text = word.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not key or not equals or value is None:
        raise ValueError(f"--only {word}: must be KEY=VALUE, such as mixer=mamba or d_model=[32, 64]")
    return key, value


def chosen(runs: Mapping[str, list], only: Sequence[tuple[str, Any]]) -> dict[str, list]:
    """The runs that fit every condition: the value itself, or one of a list; experiments without any are left out.

    Raises:
        ValueError: no run at all has such a field, or none fits.
    """
    views = {name: [(run, _view(run, name)) for run in those] for name, those in runs.items()}
    known = {key for those in views.values() for _, view in those for key in view}
    for key, _ in only:
        if key not in known:
            raise ValueError(f"--only {key}: no run has such a field{did_you_mean(key, known)}; there are: "
                             f"{', '.join(sorted(name for name in known if '.' not in name))}")
    fitting = {name: [run for run, view in those if all(_fits(view, key, value) for key, value in only)]
               for name, those in views.items()}
    if not any(fitting.values()):
        given = ", ".join(f"{key}={value}" for key, value in only)
        raise ValueError(f"--only {given}: no run fits" if only else "these parameters ask for no runs")
    return {name: those for name, those in fitting.items() if those}


def shard(
    runs: Mapping[str, list], experiments: Mapping[str, Experiment], index: int, count: int
) -> dict[str, list]:
    """The part of one of `count` machines; every machine that asks with the same runs and `count` cuts them alike.

    Runs that are compared with each other stay on one machine, where their learning rates are tried one after another.

    Args:
        runs: every run that is asked for, stored or not: what a machine finds stored must not change the cut.
        experiments: whose costs make the parts even.
        index: which machine, from 0.
    """
    cost: dict[tuple[str, str], float] = {}
    for name, those in runs.items():
        for run in those:
            place = name, cell_of(dataclasses.asdict(run))
            cost[place] = cost.get(place, 0.0) + experiments[name].cost(run)
    mine = shard_of(cost, index, count)
    return {name: [run for run in those if (name, cell_of(dataclasses.asdict(run))) in mine]
            for name, those in runs.items()}


def _view(run: Any, experiment: str) -> dict[str, Any]:
    """What a condition sees of a run: its fields, nested ones by their path (task.vocab_size), and its variant."""
    view = {"experiment": experiment, "variant": run.variant}

    def add(values: Mapping[str, Any], path: str) -> None:
        for name, value in values.items():
            view[path + name] = value
            if isinstance(value, Mapping):
                add(value, f"{path}{name}.")

    add(dataclasses.asdict(run), "")
    if "task.task" in view:
        view["task"] = view["task.task"]
    return view


def _fits(view: Mapping[str, Any], key: str, wanted: Any) -> bool:
    if key not in view:
        return False
    return view[key] == wanted or (isinstance(wanted, list) and view[key] in wanted)
