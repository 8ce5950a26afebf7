"""Tables 5 to 7 and the figures of notebook 05, from made-up rows."""

from dataclasses import asdict, replace

import pandas as pd
import pytest

from lrm_recall.efficiency.grid import retrieval_runs, state_runs
from lrm_recall.efficiency.run import EfficiencyRun
from lrm_recall.figures.display import alt_text
from lrm_recall.figures.efficiency_cells import efficiency_cells
from lrm_recall.figures.efficiency_figures import costs, resona_overhead, speed_and_state
from lrm_recall.figures.efficiency_tables import (
    TABLES,
    cold_start_table,
    paper_cost_markdown,
    paper_cost_table,
    state_cost_table,
    training_cost_table,
)
from lrm_recall.figures.verdicts import NOT_REPRODUCED, NOT_RUN, REPRODUCED, TREND_ONLY, cost_verdict
from lrm_recall.paper import paper_values
from lrm_recall.results import frame, make_row

H100 = "NVIDIA H100 80GB HBM3"
MODELS = {"gla": {"num_layers": 24}, "mamba": {"num_layers": 48, "mlp": "none"}}
RESONA = {"chunk_size": 64, "top_k": 4, "encoder": "linear"}
SHAPE = {"device_name": H100, "hidden_size": 2048, "dtype": "bfloat16"}


def row(run, ms, gib=4.0, parameters=1.37e9, created=None):
    made = make_row(
        experiment="efficiency", config=asdict(run), seed=run.seed, code="c", profile="h100", machine={},
        data={"source": "random", "revision": ""},
        metrics={"ms": ms, "ms_least": ms, "ms_most": ms, "tokens_per_s": 1e3 * run.length / ms,
                 "peak_mb": gib * 2**30 / 1e6, "parameters": parameters, "state_size": 1e6 * (1 + run.expanded_layers),
                 "import_s": 1.0, "build_s": 2.0, "forward_s": 3.0, "backward_s": 4.0},
    )  # fmt: skip
    return made | ({"created": created} if created else {})


@pytest.fixture(scope="module")
def rows():
    runs = retrieval_runs({"prefill": [2048, 131072], "decode": [2048, 131072], "train": [8192]}, models=MODELS,
                          resona=RESONA, shape=SHAPE)
    ms = {"prefill": 800.0, "decode": 250.0, "train": 300.0}
    return frame([row(run, ms[run.task] * (1.05 if run.resona else 1), 9.0 + bool(run.resona)) for run in runs])


@pytest.mark.parametrize("number", TABLES)
def test_every_printed_cell_is_in_its_table(rows, number):
    table = paper_cost_table(rows, number)
    printed = paper_values("resona", number)
    assert table["paper"].notna().sum() == len(printed) == 49
    ran = table[table["ours"].notna()]
    assert len(ran) == 8 and set(ran["scale"]) == {"paper"}
    assert set(table.loc[table["ours"].isna(), "verdict"]) == {NOT_RUN}
    cell = ran[(ran["mixer"] == "gla") & (ran["variant"] == "resona") & (ran["length"] == 131072)].iloc[0]
    base = printed[(printed["model"] == "GLA") & (printed["variant"] == "base") & (printed["prefill"] == 131072)]
    assert cell["paper_ratio"] == pytest.approx(cell["paper"] / base["value"].iloc[0])
    assert cell["our_ratio"] == pytest.approx(10 / 9 if number == 7 else 1.05)
    assert cell["verdict"] == REPRODUCED
    text = paper_cost_markdown(table, number)
    assert "at the paper's scale" in text and f"Of the 49 cells of Table {number}: " in text


def test_a_toy_value_stands_beside_no_printed_one(rows):
    toy = rows.assign(**{"config.hidden_size": 128, "metrics.parameters": 1e6})
    table = paper_cost_table(toy, 5)
    assert set(table.loc[table["ours"].notna(), "scale"]) == {"toy"}
    assert set(table.loc[table["ours"].notna(), "verdict"]) == {TREND_ONLY, NOT_RUN}
    text = paper_cost_markdown(table, 5)
    assert "not the paper's" in text and "1,518" not in text


@pytest.mark.parametrize("arguments, verdict", [
    ((None, 100.0, None, None, True), NOT_RUN),
    ((110.0, 100.0, None, None, True), REPRODUCED),
    ((111.0, 100.0, None, None, True), NOT_REPRODUCED),
    ((111.0, 100.0, 1.2, 1.1, True), TREND_ONLY),
    ((1.0, 100.0, 1.3, 1.1, False), NOT_REPRODUCED),
    ((1.0, 100.0, 1.1, 1.1, False), TREND_ONLY),
    ((1.0, 100.0, None, None, False), NOT_RUN),
])  # fmt: skip
def test_verdicts_on_costs(arguments, verdict):
    ours, paper, our_ratio, paper_ratio, at_scale = arguments
    assert cost_verdict(ours, paper, our_ratio=our_ratio, paper_ratio=paper_ratio, at_paper_scale=at_scale) == verdict


def test_the_newest_measurement_counts():
    run = EfficiencyRun(task="prefill", mixer="gla", length=2048, num_layers=24, **SHAPE)
    cells = efficiency_cells(frame([row(run, 2.0, created="2026-02-01T00:00:00+00:00"),
                                    row(run, 1.0, created="2026-01-01T00:00:00+00:00")]))
    assert cells["ms"].tolist() == [2.0]


def test_devices_are_not_mixed(rows):
    other = rows.assign(**{"config.device_name": "CPU: other"})
    with pytest.raises(ValueError, match="several devices"):
        efficiency_cells(pd.concat([rows, other]))
    with pytest.raises(ValueError, match="no measurement"):
        efficiency_cells(rows.assign(status="failed"))
    with pytest.raises(ValueError, match="no measurement"):
        efficiency_cells(frame([]))


def test_what_training_and_a_cold_start_cost(rows):
    table = training_cost_table(rows)
    assert table["time, ratio"].tolist() == [1.05] * 2 and "GLA, 1,370M" in set(table["model"])
    run = EfficiencyRun(task="cold start", mixer="gla", length=2048, num_layers=24, **SHAPE)
    assert cold_start_table(frame([])).empty
    assert cold_start_table(frame([row(run, 7000.0)])).iloc[0].tolist() == ["GLA", H100, "1.00", "2.00", "3.00", "4.00"]


def test_what_a_larger_state_costs():
    runs = state_runs({"prefill": [8192]}, models={"gla": MODELS["gla"]}, expanded=[4], shape=SHAPE)
    table = state_cost_table(frame([row(run, 100.0 + run.expanded_layers) for run in runs]))
    assert table["layers expanded"].tolist() == [0, 4, 24]
    assert table["time, ratio"].tolist() == [1.0, 1.04, 1.24]
    figure = speed_and_state(frame([row(run, 100.0) for run in runs]))
    assert "24 layers expanded: 25,000,000 elements" in alt_text(figure)
    with pytest.raises(ValueError, match="no measurement with an expanded state"):
        speed_and_state(frame([row(runs[0], 100.0)]))


def test_figures_say_what_they_draw(rows):
    assert "GLA, 131,072 tokens: 1.05 (paper 1.88)" in alt_text(resona_overhead(rows))
    assert "GLA resona, prefill, 131,072 tokens: 840 ms" in alt_text(costs(rows))
    run = EfficiencyRun(task="prefill", mixer="gla", length=2048, num_layers=24, **SHAPE)
    with pytest.raises(ValueError, match="no measurement with Resona"):
        resona_overhead(frame([row(run, 1.0), row(replace(run, task="decode"), 1.0)]))
