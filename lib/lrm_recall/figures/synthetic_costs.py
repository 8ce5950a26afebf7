"""What the runs of notebook 01 took: one line a parameter file, experiment and machine."""

from __future__ import annotations

import pandas as pd

from lrm_recall.progress import duration
from lrm_recall.train.synthetic_runs import EMBEDDING, EXAMPLES

_EXPERIMENTS = {"mqar": "MQAR", EMBEDDING: "MQAR, other embeddings", EXAMPLES: "MQAR, more examples", "mad": "MAD"}


def synthetic_costs(rows: pd.DataFrame) -> pd.DataFrame:
    """Time and memory of the stored runs.

    Args:
        rows: result rows (`lrm_recall.results.load_profiles`).

    Returns:
        profile, experiment, machine (the GPU, or the CPU), runs; `in all`, the runs' own time one after another; `the
        longest`; `most memory, MB`, of one run: of a GPU that several runs share, all that their process held.
    """
    if rows.empty:
        return pd.DataFrame()
    rows = rows.assign(machine=rows["machine.device"].where(rows["machine.device"] != "cpu", rows["machine.cpu"]))
    lines = []
    for (profile, experiment, machine), part in rows.groupby(["profile", "experiment", "machine"], sort=True):
        lines.append({
            "profile": profile, "experiment": _EXPERIMENTS.get(experiment, experiment), "machine": machine,
            "runs": len(part), "in all": duration(part["runtime_s"].sum()),
            "the longest": duration(part["runtime_s"].max()),
            "most memory, MB": f"{part['peak_memory_mb'].max():,.0f}",
        })  # fmt: skip
    return pd.DataFrame(lines)
