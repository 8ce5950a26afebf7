"""Benchmarks at a tiny size. Recurrences: the variants agree, a missed target is told. Training small models: what is
timed and written, and what is refused."""

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lrm_recall.figures.gpu_tables import TABLES
from lrm_recall.tasks.mad import MADTask
from lrm_recall.train.mad_grid import mad_runs

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "recurrences.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("recurrences", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "recurrences", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LENGTH", 40)
    monkeypatch.setattr(module, "HIDDEN", 32)
    monkeypatch.setattr(module, "GLA", {"heads": 2, "key": 4, "value": 8})
    monkeypatch.setattr(module, "SSD", {"heads": 8, "head": 8, "state": 8})
    monkeypatch.setattr(module, "DELTA", {"heads": 2, "key": 4, "value": 8})
    monkeypatch.setattr(module, "RETENTION", {"heads": 2, "key": 4, "value": 8})
    monkeypatch.setattr(module, "RWKV5", {"heads": 2, "key": 4, "value": 4})
    monkeypatch.setattr(module, "SCAN", {"channels": 8, "state": 4})
    monkeypatch.setattr(module, "HYENA", {"batch": 2, "hidden_size": 8})
    return module


def test_variants_of_a_problem_agree(bench):
    metrics = bench.time_all(1)
    assert set(metrics) == set(bench.VARIANTS)
    for name, found in metrics.items():
        assert found["error"] < 1e-5, name
        assert found["forward_ms"] > 0 and found["forward_backward_ms"] > 0 and found["forward_floor_ms"] >= 0


def test_a_missed_target_is_told(bench, capsys):
    metrics = {name: {"forward_ms": 1.0, "forward_backward_ms": 1.0} for name in bench.VARIANTS}
    assert not bench.print_targets(metrics)
    assert "MISSED" in capsys.readouterr().out


@pytest.fixture
def synthetic(monkeypatch):
    """bench/gpu_synthetic.py, its sizes small, on a CPU."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("gpu_synthetic")
    monkeypatch.setattr(module, "GPU", torch.device("cpu"))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return module


class Kept:
    """In the place of the rows: the configurations of those that would be written."""

    def __init__(self):
        self.configs = []

    def add(self, config, code, data, metrics, begin):
        self.configs.append(config)


def small_mad(mixer, precision):
    task = MADTask(task="in-context-recall", num_train_examples=20, num_test_examples=6, seq_len=16)
    (run,) = mad_runs(mixers=[mixer], tasks=[task], variants=["base"], learning_rates=[5e-4], weight_decays=[0.0],
                      settings={"d_model": 32, "batch_size": 8, "precision": precision})  # fmt: skip
    return run


def test_seconds_leave_out_the_first_epoch(synthetic, monkeypatch):
    references = sys.modules["synthetic_references"]
    ticks = iter([0, 100, 200, *(time for start in (1000, 2000, 3000) for time in (start, start + 10, start + 12))])
    monkeypatch.setattr(references, "now", lambda: next(ticks))
    done = []
    found = references.timed(lambda: done.append("epoch"), lambda: done.append("score"), epochs=3)
    assert found == (10, 2) and done == ["epoch", "score"] * 4


def test_our_loop_is_measured_on_mad(synthetic):
    benchmark = replace(synthetic.MAD, make_run=small_mad, epochs=1)
    seconds, setup = synthetic.our_seconds(benchmark, "attention", "fp32", captured=False)
    assert seconds.epoch > 0 and seconds.score > 0 and setup > 0


def test_a_run_of_mad_is_mad_labs_default(synthetic):
    run = synthetic.mad_run("rwkv5", "bf16")
    assert (run.task.seq_len, run.task.vocab_size, run.task.num_train_examples) == (128, 16, 12_800)
    assert (run.d_model, run.batch_size, run.num_blocks, run.precision) == (128, 128, 2, "bf16")
    assert {synthetic.mad_run(mixer, "fp32").mixer for mixer in synthetic.MAD_LAB} == set(synthetic.MAD_LAB)


def test_a_side_that_fails_leaves_the_others_their_rows(synthetic, monkeypatch, capsys):
    def measure(benchmark, mixer, side):
        if (mixer, side) == ("attention", "mad-lab"):
            raise RuntimeError("mad-lab's mh-attention needs flash_attn")
        return {"steps_per_s": 100.0 if side == "mad-lab" else 250.0, "epoch_s": 1.0, "score_s": 0.1}

    monkeypatch.setattr(synthetic, "measure", measure)
    rows = Kept()
    synthetic.compare(synthetic.MAD, ["hyena", "attention"], True, rows)
    sides = {(config["mixer"], config["side"]) for config in rows.configs}
    ours = set(synthetic.SIDES)
    assert sides == {("hyena", side) for side in ours | {"mad-lab"}} | {("attention", side) for side in ours}
    told = capsys.readouterr().out
    assert "needs flash_attn" in told and "ours bf16 2.5 x" in told


def test_tables_of_the_two_benchmarks_take_their_own_rows(synthetic, monkeypatch):
    monkeypatch.setattr(synthetic, "measure", lambda *_: {"steps_per_s": 7.0, "epoch_s": 1.0, "score_s": 0.1})
    rows = []
    for benchmark, per_s in ((synthetic.MQAR, 10.0), (synthetic.MAD, 20.0)):
        kept = Kept()
        synthetic.compare(benchmark, ["attention"], True, kept)
        rows += [{"experiment": "bench_gpu_synthetic", "config": config,
                  "metrics": {"steps_per_s": per_s if config["side"] in synthetic.SIDES else 5.0}}
                 for config in kept.configs]  # fmt: skip
    assert len(rows) == 10 and len({str(sorted(row["config"].items())) for row in rows}) == 10
    (mqar,), (mad,) = (TABLES[name](rows).to_dict("records") for name in ("small models", "mad"))
    assert mqar == {"mixer": "attention", "zoology": "5.0", "ours, fp32": "10.0 (2.0x)", "ours, tf32": "10.0 (2.0x)",
                    "ours, bf16": "10.0 (2.0x)", "ours, kernel by kernel": "10.0 (2.0x)"}  # fmt: skip
    assert mad["mad-lab"] == "5.0" and mad["ours, bf16"] == "20.0 (4.0x)"
    only_ours = [row for row in rows if row["config"]["side"] != "mad-lab"]
    assert len(TABLES["mad"](only_ours)) == 0 and len(TABLES["small models"](only_ours)) == 1


def test_what_a_layer_of_mad_lab_lacks_is_named(synthetic, monkeypatch):
    references = sys.modules["synthetic_references"]
    monkeypatch.setattr(references, "_command", lambda name: None)
    monkeypatch.setattr(references, "_importable", lambda name: name in ("causal_conv1d", "ninja"))
    assert references.lacks("hyena") == []
    assert references.lacks("rwkv5") == ["nvcc"] and references.lacks("mamba") == ["selective_scan_cuda"]


def test_mad_is_imported_without_flash_attn(synthetic, monkeypatch, tmp_path):
    references = sys.modules["synthetic_references"]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TUNE_ORIG_WORKING_DIR", "elsewhere")
    monkeypatch.setattr(references, "_importable", lambda name: False)
    (tmp_path / "mad").mkdir()
    (tmp_path / "mad" / "__init__.py").write_text("from flash_attn.modules.mha import MHA\n")
    references.import_mad(tmp_path)
    with references.flash_attn():
        package = importlib.import_module("mad")
    monkeypatch.delitem(sys.modules, "mad")
    assert Path(package.__file__).parent == tmp_path / "mad"
    assert os.environ["TUNE_ORIG_WORKING_DIR"] == str(tmp_path)
    assert "flash_attn" not in sys.modules  # transformers asks whether it is there


def test_a_layer_that_lacks_something_is_not_trained(synthetic, monkeypatch):
    references = sys.modules["synthetic_references"]
    monkeypatch.setattr(references, "_importable", lambda name: False)
    with pytest.raises(RuntimeError, match="mad-lab's mh-attention needs flash_attn"):
        references.mad_lab(small_mad("attention", "fp32"), 1)


@pytest.mark.parametrize(("arguments", "told"), [
    (["--mixers", "gru"], "unknown mixers gru; there are: baseconv"),
    (["--mad-mixers", "gru"], "unknown mixers gru; there are: hyena"),
    (["--mad", "/nowhere"], "/nowhere holds no folder mad"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_any_work(synthetic, monkeypatch, capsys, arguments, told):
    monkeypatch.setattr(sys, "argv", ["gpu_synthetic.py", *arguments])
    with pytest.raises(SystemExit):
        synthetic.main()
    assert told in capsys.readouterr().err
