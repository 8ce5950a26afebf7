"""The tables of what the runs of notebook 01 took, and of what is missing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from lrm_recall.figures.synthetic_costs import synthetic_costs, synthetic_left
from lrm_recall.sweep import Experiment, Plan


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


@dataclass(frozen=True)
class Spec:
    mixer: str
    hours: float
    variant: str = "base"


def trained(spec):
    raise NotImplementedError


def planned(specs, stored):
    """A plan of these runs by key, and its experiment."""
    experiment = Experiment("mqar", trained, {"source": "", "revision": ""}, lambda spec: [], lambda s: s.hours * 3600)
    missing = [key for key in specs if key not in stored]
    return Plan("mqar", specs, {}, list(stored), {}, missing, None), experiment


def test_what_is_missing_is_judged_by_the_runs_of_its_model_on_the_machine_that_did_most():
    gla = Spec("gla", 1.0)
    specs = {"a": gla, "b": replace(gla, hours=3.0), "c": replace(gla, hours=2.0), "d": Spec("h3", 10.0),
             "e": replace(gla, variant="resona0", hours=4.0)}  # fmt: skip
    plan, experiment = planned(specs, ["a", "b", "e"])
    rows = pd.DataFrame([row(60.0, 1.0, device="H200") | {"key": "a"}, row(60.0, 1.0, device="H200") | {"key": "b"},
                         row(9999.0, 1.0) | {"key": "e"}, row(1.0, 1.0, device="H200") | {"key": "elsewhere"}])
    table = synthetic_left({"mqar": plan}, {"mqar": experiment}, rows).set_index("model")
    assert list(table.index) == ["H3", "GLA"] and table["runs, at most"].tolist() == [1, 1]  # e has run
    assert table["on one CPU core"].tolist() == ["10 h 00 min", "2 h 00 min"]
    assert table["one after another"].tolist() == ["5 min", "60 s"]  # 120 s for 4 hours; H3 by GLA's two runs
    assert table["judged by"].tolist() == ["2", "2"] and set(table["machine"]) == {"H200"}


def test_without_stored_runs_there_is_no_pace_and_with_all_stored_no_line():
    specs = {"a": Spec("gla", 1.0)}
    plan, experiment = planned(specs, [])
    line, = synthetic_left({"mqar": plan}, {"mqar": experiment}, pd.DataFrame()).to_dict("records")
    assert line["machine"] == "" and "one after another" not in line
    plan, experiment = planned(specs, ["a"])
    assert synthetic_left({"mqar": plan}, {"mqar": experiment}, pd.DataFrame()).empty
