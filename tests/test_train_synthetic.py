"""Training of synthetic runs: what is learned, what is repeatable, what is refused; the grid; the choice of a rate."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from lrm_recall.code_hash import code_hash, import_closure
from lrm_recall.results import ResultStore
from lrm_recall.sweep import Experiment, run_sweep
from lrm_recall.tasks.mqar import IGNORE, mqar, split_seed
from lrm_recall.train.batches import batches
from lrm_recall.train.grid import expected_seconds, mqar_runs
from lrm_recall.train.loop import DivergedError, logits_of_questions
from lrm_recall.train.memory import peak_mb, reset_peak
from lrm_recall.train.optimise import make_optimizer
from lrm_recall.train.select import select
from lrm_recall.train.start import initial_model
from lrm_recall.train.synthetic import MQARRun, code_modules, mqar_splits, run_mqar

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
RESONA = {"layers": [0], "chunk_size": 2, "top_k": 1}


def small(**changes) -> MQARRun:
    """A run of a fraction of a second."""
    return MQARRun(**{
        "mixer": "baseconv", "mixer_args": {"max_length": 16}, "layer_overrides": {"1": {"kernel_size": -1}},
        "d_model": 32, "num_layers": 2, "vocab_size": 32, "input_length": 16, "num_kv_pairs": 2,
        "num_train": 2000, "num_valid": 200, "num_test": 200, "batch_size": 50, "learning_rate": 5e-3,
        "max_epochs": 2, **changes,
    })


def untrained(run: MQARRun):
    return initial_model(run.to_model_config(), run.seed)


def without_seconds(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in history]


# --- training ---


def test_resona_learns_what_its_base_does_not():
    base, resona = run_mqar(small()), run_mqar(small(resona=RESONA))
    assert base["metrics"]["accuracy"] < 0.5
    assert resona["metrics"]["accuracy"] > 0.8
    for result in (base, resona):
        assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]
        assert result["metrics"]["sequence_accuracy"] <= result["metrics"]["accuracy"]


@pytest.mark.parametrize("mixer", ["attention", "baseconv", "gla", "mamba2"])
def test_every_mixer_trains(mixer):
    args = {"mamba2": {"state_size": 8, "head_dim": 16}, "baseconv": {"max_length": 16}}.get(mixer, {})
    run = small(mixer=mixer, mixer_args=args, layer_overrides={}, num_train=500, max_epochs=4)
    losses = [epoch["train_loss"] for epoch in run_mqar(run)["history"]]
    assert losses[-1] < 0.9 * losses[0]


def test_result_is_complete_and_plain_json():
    heard = []
    run = small(num_train=130, target_accuracy=None)
    result = run_mqar(run, progress=heard.append)
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"metrics", "history", "runtime_s", "peak_memory_mb"}
    assert heard == result["history"] and [epoch["epoch"] for epoch in heard] == [1, 2]
    assert set(heard[0]) == {"epoch", "train_loss", "valid_accuracy", "seconds"}
    metrics = result["metrics"]
    model = untrained(run)
    assert metrics["parameters"] == model.num_parameters() and metrics["state_size"] == model.state_size(16)
    assert (metrics["epochs"], metrics["steps"]) == (2, 6)  # 130 examples in batches of 50, twice
    assert metrics["valid_accuracy"] == heard[-1]["valid_accuracy"]
    seconds = sum(epoch["seconds"] for epoch in heard)
    assert metrics["tokens_per_s"] == pytest.approx(2 * 130 * 16 / seconds)
    assert seconds < result["runtime_s"] and result["peak_memory_mb"] > 50


def test_same_seed_same_metrics_and_no_trace_in_torch():
    run = small(num_train=300, resona=RESONA)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    first = run_mqar(replace(run))  # a new run is checked anew: that leaves no trace either
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    torch.manual_seed(12345)
    second, other = run_mqar(run), run_mqar(replace(run, seed=1))

    def timeless(result):
        return {**result["metrics"], "tokens_per_s": None}, without_seconds(result["history"])

    assert timeless(first) == timeless(second)
    assert first["history"][0]["train_loss"] != other["history"][0]["train_loss"]


def test_stops_after_the_epoch_that_reaches_the_target():
    run = small(resona=RESONA, max_epochs=6, target_accuracy=None)
    full = without_seconds(run_mqar(run)["history"])
    assert len(full) == 6
    target = full[1]["valid_accuracy"]
    assert target > full[0]["valid_accuracy"]
    stopped = run_mqar(replace(run, target_accuracy=target))
    assert without_seconds(stopped["history"]) == full[:2]  # the schedule does not know that it will be cut
    assert stopped["metrics"]["epochs"] == 2


def test_divergence_is_an_error_that_says_where():
    with pytest.raises(DivergedError, match=r"diverged in epoch 1 of 2 at learning rate 1e\+30: train loss nan"):
        run_mqar(small(learning_rate=1e30, num_train=200))


def test_logits_are_those_of_the_whole_model_at_the_questions():
    run = small(resona=RESONA, num_train=20)
    model = untrained(run).eval()
    split = mqar_splits(run).train
    data = mqar(vocab_size=32, num_examples=20, input_length=16, num_kv_pairs=2, seed=split_seed(0, "train"))
    assert torch.equal(split.inputs, data.inputs)
    assert torch.equal(data.labels.gather(1, split.positions), split.answers)
    everywhere = model(input_ids=data.inputs).logits  # [20, 16, V]
    torch.testing.assert_close(logits_of_questions(model, split), everywhere[data.labels != IGNORE])


def test_every_example_is_seen_once_an_epoch():
    split = mqar_splits(small(num_train=130)).train
    parts = list(batches(split, 50, torch.Generator().manual_seed(0)))
    assert [len(batch.inputs) for batch in parts] == [50, 50, 30]
    seen = torch.cat([torch.cat(list(batch), dim=1) for batch in parts])  # [130, L + 2 P]
    rows = torch.cat(list(split), dim=1)
    assert not torch.equal(seen, rows)
    assert sorted(seen.tolist()) == sorted(rows.tolist())


def test_data_is_made_once_and_splits_differ():
    run = small(num_train=200)
    splits = mqar_splits(run)
    assert mqar_splits(replace(run, learning_rate=1e-4)).train.inputs is splits.train.inputs
    assert not torch.equal(mqar_splits(replace(run, seed=1)).valid.inputs, splits.valid.inputs)
    assert not torch.equal(splits.valid.inputs, splits.test.inputs)
    assert not torch.equal(splits.train.inputs, splits.valid.inputs)


def test_only_matrices_are_decayed():
    run = small(mixer="mamba2", mixer_args={"head_dim": 16}, layer_overrides={}, resona=RESONA)
    model = untrained(run)
    decayed, kept = make_optimizer(model, run.to_fit_settings()).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert sorted(names[id(p)] for group in (decayed, kept) for p in group["params"]) == sorted(names.values())
    kept_names = {names[id(p)].rsplit(".", 1)[1] for p in kept["params"]}
    assert {"A_log", "dt_bias", "log_temperature"} <= kept_names
    assert "model.embeddings.weight" in {names[id(p)] for p in decayed["params"]}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak of a process")
def test_peak_memory_counts_from_the_reset():
    reset_peak(CPU)
    before = peak_mb(CPU)
    block = torch.ones(50_000_000)
    del block
    assert 190 < peak_mb(CPU) - before < 250


# --- what a run may be ---


def test_run_survives_json():
    run = small(resona=RESONA)
    assert MQARRun(**json.loads(json.dumps(asdict(run)))) == run
    assert (small().variant, run.variant) == ("base", "resona0")
    assert small(resona={**RESONA, "layers": [0, 1]}).variant == "resona0+1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": "glaa"}, "unknown mixer 'glaa'"),
        ({"mixer_args": {"maxlength": 16}}, "no option 'maxlength'.*did you mean 'max_length'"),
        ({"mixer": "gla", "mixer_args": {"num_heads": 5}, "layer_overrides": {}}, "num_heads must divide"),
        ({"layer_overrides": {"2": {"kernel_size": 3}}}, "names layer 2; this model has layers 0 to 1"),
        ({"resona": {**RESONA, "layers": [2]}}, "names layer 2; this model has layers 0 to 1"),
        ({"resona": {**RESONA, "top_k": 0}}, "top_k must be at least 1, got 0"),
        ({"resona": {**RESONA, "chunk_size": 17}}, r"chunk_size must be below the input length \(16\), got 17"),
        ({"resona": {"layers": [0]}}, r"chunk_size must be below the input length \(16\), got 64"),  # its default
        ({"resona": {**RESONA, "num_heads": 5}}, "num_heads 5 does not divide the hidden size 32"),
        ({"learning_rate": "1e-3"}, "'learning_rate' must be float, got '1e-3'"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above zero, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above zero, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number, zero or above, got -0.1"),
        ({"d_model": 32.0}, "'d_model' must be int, got 32.0"),
        ({"d_model": 0}, "hidden_size must be at least 1, got 0"),
        ({"max_epochs": 0}, "max_epochs must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"target_accuracy": 1.5}, r"target_accuracy must lie in \(0, 1\] or be None, got 1.5"),
        ({"num_kv_pairs": 5}, "num_kv_pairs must be at most input_length / 4 = 4, got 5"),
        ({"vocab_size": 16}, "vocab_size must be greater than input_length"),
        ({"generator": "quick"}, "'generator' must be"),
        ({"seed": -1}, "seed must be in 0"),
    ],
)
def test_a_run_that_cannot_be_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


# --- the grid ---


def test_grid_is_every_combination():
    runs = mqar_runs(mixers=["baseconv", "gla"], lengths={64: 4, 128: 8}, d_models=[32, 64], seeds=[0, 1, 2],
                     mixer_args={"gla": {"num_heads": 2}}, settings={"max_epochs": 3})
    assert len(runs) == 2 * 2 * 2 * 3 * 4 * 3
    assert len({json.dumps(asdict(run), sort_keys=True) for run in runs}) == len(runs)
    assert {run.variant for run in runs} == {"base", "resona0", "resona2"}
    assert {run.max_epochs for run in runs} == {3}
    assert all(run.num_kv_pairs == run.input_length // 16 for run in runs)
    assert all(run.mixer_args == {"num_heads": 2} and not run.layer_overrides for run in runs if run.mixer == "gla")
    retrieval = next(run.resona for run in runs if run.variant == "resona2")
    assert (retrieval["layers"], retrieval["chunk_size"], retrieval["top_k"]) == ([2], 2, 1)  # appendix A.3
    assert {"encoder", "gate", "alpha", "num_heads", "memory_norm"} <= retrieval.keys()
    long = next(run for run in runs if run.mixer == "baseconv" and run.input_length == 128)
    kernels = [long.to_model_config().mixer_options(layer) for layer in range(4)]
    assert kernels == [{"max_length": 128, "kernel_size": size} for size in (3, -1, 3, -1)]  # zoology, Figure 2


@pytest.mark.parametrize("profile", ["paper", "h100"])
def test_a_profile_has_every_cell_of_table_11(profile):
    asked = yaml.safe_load((ROOT / "params" / profile / "01_synthetic.yaml").read_text())
    table = {"baseconv", "h3", "hyena", "rwkv4", "mamba", "mamba2"} & set(asked["mixers"])
    assert len(table) * len(asked["lengths"]) * len(asked["d_models"]) * len(asked["variants"]) == 288
    length, pairs, batch_size = max(asked["lengths"])
    runs = mqar_runs(mixers=asked["mixers"], lengths={length: pairs}, d_models=asked["d_models"], variants=["base"],
                     learning_rates=asked["learning_rates"][:1], mixer_args=asked["mixer_args"],
                     settings={"batch_size": batch_size, "num_train": asked["num_train"]})
    assert len(runs) == 4 * len(asked["mixers"])
    of = {run.mixer: run for run in runs if run.d_model == 128}
    assert of["hyena"].mixer_args == {"l_max": 512} and of["h3"].mixer_args == {"d_state": 512, "head_dim": 2}
    assert [of["rwkv4"].to_model_config().mixer_options(layer) for layer in range(4)] == [
        {"layer_idx": layer} for layer in range(4)
    ]  # fmt: skip
    assert of["gated_deltanet"].mixer_args == {"num_heads": 2, "head_dim": 64, "expand_v": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": ["resona"]}, "got 'resona'"),
        ({"resona": {"topk": 1}}, "resona has no option 'topk' .did you mean 'top_k'"),
        ({"variants": ["resona4"]}, "names layer 4; this model has layers 0 to 3"),
        ({"mixers": []}, r"mixers must list at least one value, got \[\]"),
        ({"mixers": "gla"}, "mixers must list at least one value, got 'gla'"),
        ({"settings": {"max_epoch": 3}}, "settings has an unknown name 'max_epoch' .did you mean 'max_epochs'"),
        ({"settings": {"seed": 3}}, "settings has an unknown name 'seed'"),
        ({"settings": {"num_layers": "4"}}, "num_layers must be an integer, got '4'"),
        ({"mixer_args": {"mamba2": {}}}, "mixer_args has an unknown name 'mamba2'"),
        ({"learning_rates": ["1e-3"]}, "'learning_rate' must be float, got '1e-3'"),
    ],
)
def test_grid_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        mqar_runs(**{"mixers": ["gla"], "lengths": {64: 4}, "d_models": [32], **change})


def test_expected_seconds_grow_with_the_work():
    run = small()
    harder = [{"d_model": 64}, {"max_epochs": 4}, {"num_train": 4000}, {"resona": RESONA}, {"vocab_size": 64}]
    assert all(expected_seconds(replace(run, **change)) > expected_seconds(run) > 0 for change in harder)


# --- the choice of a learning rate ---


def table(*rows: tuple) -> pd.DataFrame:
    """Rows of (mixer, learning rate, seed, validation accuracy, test accuracy)."""
    names = ["config.mixer", "config.learning_rate", "seed", "metrics.valid_accuracy", "metrics.accuracy"]
    return pd.DataFrame(rows, columns=names).assign(profile="laptop", **{"config.seed": [row[2] for row in rows]})


def test_select_takes_the_rate_of_best_validation_accuracy_over_seeds():
    frame = table(
        ("gla", 1e-3, 0, 0.6, 0.9), ("gla", 1e-3, 1, 0.6, 0.9),  # best on the test set, which must not matter
        ("gla", 1e-2, 0, 0.9, 0.1), ("gla", 1e-2, 1, 0.5, 0.2),  # best on average
        ("gla", 1e-1, 0, 1.0, 1.0),  # its other seed diverged: 0.5 on average
        ("mamba2", 1e-3, 0, 0.3, 0.4), ("mamba2", 1e-2, 0, 0.3, 0.5),  # equal: the smaller
    )
    assert select(frame).index.tolist() == [2, 3, 5]
    assert select(frame.iloc[::-1]).sort_index().equals(select(frame))


def test_select_keeps_cells_apart_and_sees_missing_options():
    frame = table(("gla", 1e-3, 0, 0.1, 0.1), ("gla", 1e-2, 0, 0.2, 0.2), ("gla", 1e-3, 0, 0.3, 0.3),
                  ("gla", 1e-3, 0, 0.4, 0.4))
    frame["config.resona.layers"] = [None, None, (0,), (2,)]
    frame["config.resona.chunk_size"] = [float("nan"), float("nan"), 2, 2]
    assert select(frame).index.tolist() == [1, 2, 3]


def test_select_needs_its_columns():
    with pytest.raises(ValueError, match="no column 'metrics.valid_accuracy'"):
        select(table(("gla", 1e-3, 0, 0.1, 0.1)).drop(columns="metrics.valid_accuracy"))


# --- with the sweep ---


def test_sweep_of_runs_ends_in_selected_rows(tmp_path):
    runs = [small(num_train=400, num_valid=40, num_test=40, max_epochs=1, resona=resona, learning_rate=rate)
            for resona in (None, RESONA) for rate in (1e-4, 5e-3)]
    store = ResultStore(tmp_path / "synthetic.smoke.jsonl")
    experiment = Experiment("mqar", run_mqar, {"source": "generated", "revision": "1"}, code_modules, expected_seconds)
    rows = run_sweep(runs, experiment, store, profile="smoke", progress=False)
    assert [row["status"] for row in rows] == ["ok"] * 4
    chosen = select(store.frame())
    assert len(chosen) == 2
    best = max((row for row in rows if row["config"]["resona"]), key=lambda row: row["metrics"]["valid_accuracy"])
    assert best["key"] in set(chosen["key"])


def test_code_of_a_run_includes_its_mixer_and_resona():
    gla, conv = small(mixer="gla", mixer_args={}, layer_overrides={}), small()
    assert code_hash(code_modules(gla)) != code_hash(code_modules(conv))
    needed = {"lrm_recall.mixers.gla", "lrm_recall.ops.gla", "lrm_recall.resona.search", "lrm_recall.tasks.mqar"}
    assert needed <= import_closure(code_modules(replace(gla, resona=RESONA))).keys()
    assert not any(name.startswith(("lrm_recall.train.grid", "lrm_recall.sweep", "lrm_recall.results"))
                   for name in import_closure(code_modules(gla)))  # what decides no result invalidates no row
