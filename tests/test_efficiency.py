"""Measurements of cost: what a run may be, what measuring gives, and the grids of notebook 05."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from lrm_recall.efficiency import run as efficiency
from lrm_recall.efficiency.grid import retrieval_runs, shallowest_middle_deepest, state_runs, this_device
from lrm_recall.efficiency.run import EfficiencyRun, code_modules, measure
from lrm_recall.efficiency.stored import stored_rows
from lrm_recall.efficiency.timing import decode, timed
from lrm_recall.model import RecurrentLM
from lrm_recall.results import ResultStore, make_row

SHAPE = {"device_name": "CPU: test", "hidden_size": 16, "vocab_size": 32, "dtype": "float32", "repeats": 2,
         "new_tokens": 3}  # fmt: skip
GLA = {"num_layers": 3, "mixer_args": {"num_heads": 2}}
RESONA = {"chunk_size": 4, "top_k": 2, "encoder": "linear", "encoder_dim": 8}


def a_run(**changes):
    return EfficiencyRun(**{"task": "prefill", "mixer": "gla", "length": 20, **GLA, **SHAPE, **changes})


@pytest.mark.parametrize("task", ["prefill", "decode", "train"])
@pytest.mark.parametrize("change", [{}, {"resona": {"layers": [0], **RESONA}}, {"expanded_layers": 2}], ids=str)
def test_measures_every_task_and_variant(task, change):
    run = a_run(task=task, **change)
    metrics = measure(run)["metrics"]
    assert metrics["ms_least"] <= metrics["ms"] <= metrics["ms_most"]
    tokens = 3 if task == "decode" else 20
    assert metrics["tokens_per_s"] == pytest.approx(1e3 * tokens / metrics["ms"])
    json.dumps(asdict(run)), json.dumps(metrics)


def test_counts_are_those_of_the_model():
    small, large = (measure(a_run(expanded_layers=m))["metrics"] for m in (0, 3))
    assert large["state_size"] == 2 * small["state_size"]  # two heads became one
    model = RecurrentLM(a_run().to_model_config())
    assert small["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_model_is_built_once_for_the_runs_that_share_it(monkeypatch):
    built, build = [], efficiency._build
    monkeypatch.setattr(efficiency, "_build", lambda run, device: built.append(run) or build(run, device))
    for run in [a_run(length=8), a_run(task="decode"), a_run(expanded_layers=1), a_run(task="train")]:
        measure(replace(run, seed=7))
    assert [run.expanded_layers for run in built] == [0, 1, 0]
    assert len(efficiency._built) == 1  # the others were given up for their memory


def test_decoding_counts_the_new_tokens_alone():
    model = RecurrentLM(a_run().to_model_config()).eval()
    lengths = []
    model.model.embeddings.register_forward_hook(lambda module, ids, output: lengths.append(ids[0].shape[1]))
    assert decode(model, torch.ones(1, 9, dtype=torch.int64), 4) > 0
    assert lengths == [9, 1, 1, 1, 1]


def test_a_training_step_with_checkpointing_leaves_no_gradient_behind():
    run = a_run(task="train", checkpointing=True)
    measure(run)
    (model,) = efficiency._built.values()
    assert model.is_gradient_checkpointing and all(p.grad is None for p in model.parameters())


def test_timed_warms_up_and_takes_the_part_that_counts():
    calls = []
    seconds = timed(lambda: calls.append(1) or 0.5, torch.device("cpu"), 3)
    assert seconds == [0.5] * 3 and len(calls) == 4
    assert timed(lambda: 6.0, torch.device("cpu"), 5) == [6.0, 6.0]


def test_cold_start_runs_in_a_process_of_its_own():
    metrics = measure(a_run(task="cold start"))["metrics"]
    assert metrics["import_s"] > 0.1 and metrics["ms"] == 1e3 * (metrics["forward_s"] + metrics["backward_s"])


@pytest.mark.parametrize("change, message", [
    ({"task": "sleep"}, "task"),
    ({"length": 0}, "length must be at least 1, got 0"),
    ({"repeats": 0}, "repeats must be at least 1"),
    ({"expanded_layers": 4}, "expanded_layers must lie in 0 to 3, got 4"),
    ({"mixer_args": {"num_head": 2}}, "did you mean"),
    ({"hidden_size": 15}, "15"),
    ({"dtype": "float16"}, "dtype"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        a_run(**change)


def test_retrieval_stands_in_the_shallowest_middle_and_deepest_layer():
    assert shallowest_middle_deepest(24) == [0, 12, 23] and shallowest_middle_deepest(2) == [0, 1]
    runs = retrieval_runs({"prefill": [8, 16], "decode": [8]}, models={"gla": GLA, "attention": {"num_layers": 2}},
                          resona=RESONA, shape=SHAPE, without=["attention"])
    assert [(run.mixer, run.variant, run.task, run.length) for run in runs[:6]] == [
        ("gla", variant, *what) for variant in ("base", "resona")
        for what in (("prefill", 8), ("prefill", 16), ("decode", 8))]
    assert {run.variant for run in runs[6:]} == {"base"} and runs[3].resona == {"layers": [0, 1, 2], **RESONA}


def test_states_are_expanded_in_some_and_in_all_layers():
    runs = state_runs({"prefill": [8]}, models={"gla": GLA}, expanded=[1], shape=SHAPE)
    assert [run.expanded_layers for run in runs] == [0, 1, 3]
    with pytest.raises(ValueError, match="unknown field 'layers'"):
        state_runs({"prefill": [8]}, models={"gla": {"layers": 2}}, expanded=[1], shape=SHAPE)
    with pytest.raises(ValueError, match="needs num_layers"):
        state_runs({"prefill": [8]}, models={"gla": {}}, expanded=[1], shape=SHAPE)


def test_the_device_is_part_of_a_run_and_kernels_of_its_code():
    assert this_device("cpu").startswith("CPU: ")
    assert not any("libraries" in name for name in code_modules(a_run()))
    assert "lrm_recall.ops.libraries.fla" in code_modules(a_run(device_name="NVIDIA H100 80GB HBM3"))


def test_rows_of_another_device_are_those_stored_last_whatever_the_code(tmp_path):
    here, there = a_run(), a_run(device_name="NVIDIA H100 80GB HBM3")
    store = ResultStore(tmp_path / "efficiency.h100.jsonl")
    for run, code, ms, day in [(there, "new", 2.0, 3), (there, "old", 1.0, 2), (here, "new", 9.0, 4)]:
        row = make_row(experiment="efficiency", config=asdict(run), seed=run.seed, code=code, profile="h100",
                       machine={}, data={"source": "random", "revision": ""}, metrics={"ms": ms})  # fmt: skip
        store.append(row | {"created": f"2026-11-0{day}T00:00:00.000+00:00"})
    never = replace(there, length=there.length + 1)
    assert [row["metrics"]["ms"] for row in stored_rows([never, there], store)] == [2.0]
