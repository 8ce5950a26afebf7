"""The table of what the runs of notebook 01 took."""

from __future__ import annotations

import pandas as pd

from lrm_recall.figures.synthetic_costs import synthetic_costs


def row(seconds, memory, *, profile="laptop", experiment="mqar", device="cpu"):
    return {"profile": profile, "experiment": experiment, "machine.device": device, "machine.cpu": "EPYC",
            "runtime_s": seconds, "peak_memory_mb": memory}  # fmt: skip


def test_a_line_for_every_profile_experiment_and_machine():
    rows = pd.DataFrame([row(40.0, 500.0), row(80.0, 1500.4), row(30.0, 900.0, experiment="mad"),
                         row(7000.0, 3e3, profile="paper", device="H200")])  # fmt: skip
    table = synthetic_costs(rows)
    assert table.to_dict("records") == [
        {"profile": "laptop", "experiment": "MAD", "machine": "EPYC", "runs": 1, "in all": "30 s",
         "the longest": "30 s", "most memory, MB": "900"},
        {"profile": "laptop", "experiment": "MQAR", "machine": "EPYC", "runs": 2, "in all": "2 min",
         "the longest": "80 s", "most memory, MB": "1,500"},
        {"profile": "paper", "experiment": "MQAR", "machine": "H200", "runs": 1, "in all": "1 h 57 min",
         "the longest": "1 h 57 min", "most memory, MB": "3,000"},
    ]  # fmt: skip


def test_no_rows_no_lines():
    assert len(synthetic_costs(pd.DataFrame())) == 0
