"""What the runs of notebook 01 took, and what those that are not stored yet would take."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lrm_recall.figures.style import in_order, mark
from lrm_recall.progress import duration
from lrm_recall.sweep import Experiment, Plan
from lrm_recall.train.synthetic_runs import EMBEDDING, EXAMPLES

_EXPERIMENTS = {"mqar": "MQAR", EMBEDDING: "MQAR, other embeddings", EXAMPLES: "MQAR, more examples", "mad": "MAD"}


def synthetic_costs(rows: pd.DataFrame) -> pd.DataFrame:
    """Time and memory of the stored runs, one line a parameter file, experiment and machine.

    Args:
        rows: result rows (`lrm_recall.results.load_profiles`).

    Returns:
        profile, experiment, machine (the GPU, or the CPU), runs; `in all`, the runs' own time one after another; `the
        longest`; `most memory, MB`, of one run: of a GPU that several runs share, all that their process held.
    """
    if rows.empty:
        return pd.DataFrame()
    rows = rows.assign(machine=_machines(rows))
    lines = []
    for (profile, experiment, machine), part in rows.groupby(["profile", "experiment", "machine"], sort=True):
        lines.append({
            "profile": profile, "experiment": _EXPERIMENTS.get(experiment, experiment), "machine": machine,
            "runs": len(part), "in all": duration(part["runtime_s"].sum()),
            "the longest": duration(part["runtime_s"].max()),
            "most memory, MB": f"{part['peak_memory_mb'].max():,.0f}",
        })  # fmt: skip
    return pd.DataFrame(lines)


def synthetic_left(
    plans: Mapping[str, Plan], experiments: Mapping[str, Experiment], rows: pd.DataFrame
) -> pd.DataFrame:
    """What is missing, and what it would take.

    Args:
        plans: by experiment (`lrm_recall.train.rates.plan_rates`). experiments: whose costs the plans have.
        rows: result rows; a run is expected to take as long, for its cost, as those of its experiment and model that
            ran on the machine with the most of them.

    Returns:
        experiment, model; `runs, at most`, since a model that is solved is not trained at the next learning rate; `on
        one CPU core`, roughly; machine; `one after another`, at the pace of the runs there, whose number is `judged
        by`. Empty when nothing is missing.
    """
    lines = []
    for name, plan in plans.items():
        costs = {key: experiments[name].cost(spec) for key, spec in plan.specs.items()}
        machine, seconds = _usual_machine(rows, plan)
        waiting = set(plan.missing)
        groups: dict[tuple[str, str], list[str]] = {}
        for key, spec in plan.specs.items():
            groups.setdefault((spec.mixer, "" if spec.variant == "base" else " + Resona"), []).append(key)
        places = {mixer: place for place, mixer in enumerate(in_order([mixer for mixer, _ in groups]))}
        for (mixer, variant), keys in sorted(groups.items(), key=lambda item: (places[item[0][0]], item[0][1])):
            missing = [key for key in keys if key in waiting]
            if not missing:
                continue
            judges = [key for key in keys if key in seconds] or list(seconds)
            hint = sum(costs[key] for key in missing)
            line = {"experiment": _EXPERIMENTS.get(name, name), "model": mark(mixer).name + variant,
                    "runs, at most": len(missing), "on one CPU core": duration(hint), "machine": machine}
            if judges:
                pace = sum(seconds[key] for key in judges) / sum(costs[key] for key in judges)
                line |= {"one after another": duration(hint * pace), "judged by": str(len(judges))}
            lines.append(line)
    return pd.DataFrame(lines)


def _machines(rows: pd.DataFrame) -> pd.Series:
    """The GPU of each row, or its CPU."""
    return rows["machine.device"].where(rows["machine.device"] != "cpu", rows["machine.cpu"])


def _usual_machine(rows: pd.DataFrame, plan: Plan) -> tuple[str, dict[str, float]]:
    """The machine that did most of a plan's stored runs, and their seconds by key; none without such rows."""
    stored = rows[rows["key"].isin(plan.stored)] if len(rows) else rows
    if stored.empty:
        return "", {}
    machines = _machines(stored)
    usual = machines.mode().iloc[0]
    there = stored[machines == usual]
    return usual, dict(zip(there["key"], there["runtime_s"].astype(float), strict=True))
