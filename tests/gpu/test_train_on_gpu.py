"""Training on a GPU: replaying a captured step gives what the plain loop gives, alone and beside other runs."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from lrm_recall.results import ResultStore
from lrm_recall.sweep import Experiment
from lrm_recall.train.device import own_stream, turn
from lrm_recall.train.graph import GraphLoop
from lrm_recall.train.grid import mqar_runs
from lrm_recall.train.loop import DivergedError, fit, logits_of_questions
from lrm_recall.train.plain import PlainLoop
from lrm_recall.train.rates import sweep_rates
from lrm_recall.train.start import initial_model
from lrm_recall.train.synthetic import MQARRun, code_modules, mqar_splits, run_mqar

MIXERS = ["baseconv", "h3", "hyena", "rwkv4", "mamba", "mamba2", "gla", "deltanet", "gated_deltanet", "attention"]
ARGS = {"gla": {"num_heads": 2}, "deltanet": {"num_heads": 2}, "attention": {"num_heads": 1}}  # of params/paper
SETTINGS = {"num_train": 72, "num_valid": 40, "num_test": 40, "batch_size": 32, "max_epochs": 2, "num_layers": 3,
            "generator": "fast", "vocab_size": 256, "target_accuracy": None, "embedding_range": 0.1}
GPU = torch.device("cuda")


def make(mixer: str, variant: str = "base", **changes) -> MQARRun:
    (run,) = mqar_runs(mixers=[mixer], lengths={64: 4}, d_models=[64], variants=[variant], learning_rates=[1e-3],
                       mixer_args={mixer: ARGS[mixer]} if mixer in ARGS else None, settings=SETTINGS)
    return replace(run, **changes)


def loops(run: MQARRun) -> tuple[GraphLoop, PlainLoop]:
    """The same run twice, on the current stream."""
    settings, splits = run.to_fit_settings(), mqar_splits(run).to(GPU)
    models = [initial_model(run.to_model_config(), run.seed).to(GPU) for _ in range(2)]
    return (GraphLoop(settings, models[0], splits, logits_of_questions),
            PlainLoop(settings, models[1], splits.train, logits_of_questions, partial(turn, run.precision)))


def timeless(result: dict) -> tuple[dict, list[dict]]:
    return ({**result["metrics"], "tokens_per_s": None}, [{**epoch, "seconds": None} for epoch in result["history"]])


def assert_same(mine: dict, theirs: dict, rel: float = 1e-5) -> None:
    """The same losses to rounding: some kernels add up in whatever order their blocks end."""
    for one, other in zip(mine["history"], theirs["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=rel)
    assert mine["metrics"]["test_loss"] == pytest.approx(theirs["metrics"]["test_loss"], rel=rel)


@pytest.mark.parametrize("variant", ["base", "resona0"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_replay_trains_as_the_plain_loop(mixer, variant):
    run = make(mixer, variant)
    with own_stream(GPU):
        graph, plain = loops(run)  # CaptureError: the mixer cannot be captured
        splits = mqar_splits(run).to(GPU)
        for epoch in range(2):
            rel = 1e-5 if epoch == 0 else 1e-4  # AdamW makes steps of full size out of gradients that are rounding
            assert graph.epoch() == pytest.approx(plain.epoch(), rel=rel)
            assert graph.predict(splits.valid)[1] == pytest.approx(plain.predict(splits.valid)[1], rel=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_replay_in_bf16(mixer):
    run = make(mixer, "resona0", precision="bf16")
    with own_stream(GPU):
        graph, plain = loops(run)
        for _ in range(2):
            assert graph.epoch() == pytest.approx(plain.epoch(), rel=1e-3)
    pair = run, replace(run, precision="fp32")
    loss, exact = (run_mqar(each, device="cuda")["metrics"]["test_loss"] for each in pair)
    assert loss == pytest.approx(exact, rel=3e-2)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_narrowest_models_are_captured_too(mixer):
    (run,) = mqar_runs(mixers=[mixer], lengths={128: 8}, d_models=[32], variants=["resona2"], learning_rates=[1e-3],
                       mixer_args={mixer: ARGS[mixer]} if mixer in ARGS else None,
                       settings={**SETTINGS, "max_epochs": 1, "precision": "tf32"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a CUDA graph.*")
        assert run_mqar(run, device="cuda")["history"][0]["train_loss"] > 0


@pytest.mark.parametrize("mixer", ["baseconv", "mamba2"])
def test_a_run_learns_and_stops_early(mixer):
    run = make(mixer, "resona0", num_train=300, max_epochs=40, learning_rate=1e-2, target_accuracy=0.99)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a CUDA graph.*")
        result = run_mqar(run, device="cuda")
    assert result["metrics"]["accuracy"] > 0.97
    assert result["history"][-1]["valid_accuracy"] >= 0.99 > result["history"][-2]["valid_accuracy"]
    assert len(result["history"]) < 40


def test_tf32_is_another_precision():
    losses = {}
    for precision in ("fp32", "tf32"):
        run = make("attention", precision=precision, d_model=128)
        losses[precision] = run_mqar(run, device="cuda")["history"][-1]["train_loss"]
    assert losses["fp32"] != losses["tf32"] and losses["fp32"] == pytest.approx(losses["tf32"], rel=1e-2)


def test_what_cannot_be_captured_is_trained_in_the_plain_loop():
    run = make("attention")
    settings, splits = run.to_fit_settings(), mqar_splits(run).to(GPU)

    def reads_back(model, batch):
        logits = logits_of_questions(model, batch)
        return logits * (1.0 if logits.sum().item() else 1.0)

    def score(predictions, answers):
        return (predictions == answers).float().mean().item()

    def trained(logits):
        return fit(settings, initial_model(run.to_model_config(), 0).to(GPU), splits, logits, score)

    with pytest.warns(RuntimeWarning, match="attention is trained without a CUDA graph"):
        slow = trained(reads_back)
    quick = trained(logits_of_questions)  # captured, after a capture that failed
    for one, other in zip(slow.history, quick.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


def test_divergence_stops_no_other_run():
    run = make("baseconv", num_train=200)
    before = run_mqar(run, device="cuda")
    with pytest.raises(DivergedError, match="diverged in epoch 1"):
        run_mqar(replace(run, learning_rate=1e30), device="cuda")
    assert_same(run_mqar(run, device="cuda"), before)


def test_runs_side_by_side_give_what_they_give_alone():
    models = (("baseconv", "base"), ("mamba2", "resona0"), ("gla", "base"), ("attention", "resona2"))
    runs = [make(mixer, variant, num_train=2000) for mixer, variant in models]
    alone = [run_mqar(run, device="cuda") for run in runs]
    start = threading.Barrier(len(runs))

    def together(run):
        start.wait()
        return run_mqar(run, device="cuda")

    with ThreadPoolExecutor(len(runs)) as pool:
        for mine, theirs in zip(pool.map(together, runs), alone, strict=True):
            assert_same(mine, theirs, rel=1e-3)  # 126 steps: rounding grows


def test_a_sweep_packs_runs_on_one_gpu(tmp_path):
    pytest.importorskip("distributed")
    runs = [make("baseconv", num_train=500, max_epochs=1, seed=seed) for seed in range(4)]
    runs.append(replace(runs[0], learning_rate=1e30))
    experiment = Experiment("mqar", partial(run_mqar, device="cuda"), {"source": "generated", "revision": "1"},
                            code_modules)
    store = ResultStore(tmp_path / "synthetic.smoke.jsonl")
    with pytest.warns(UserWarning, match="1 of 1 runs failed"):
        rows = sweep_rates(runs, experiment, store, workers=3, device="cuda", profile="smoke", progress=False)
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["failed"]
    assert "DivergedError" in rows[-1]["error"]
    assert {row["config"]["seed"] for row in rows} == {0, 1, 2, 3}
    assert rows[0]["config"] == asdict(runs[0])


def test_a_lost_gpu_is_told_from_a_failed_run():
    code = """if True:
        import torch
        from lrm_recall.train.device import DeviceLostError, own_stream
        try:
            with own_stream(torch.device("cuda")):
                raise ValueError("the run's own fault")
        except ValueError:
            print("alive")
        try:
            with own_stream(torch.device("cuda")):
                table, index = torch.zeros(4, device="cuda"), torch.tensor([9], device="cuda")
                print(table.index_select(0, index).sum().item())
        except DeviceLostError as error:
            print("lost", error.breaks_process)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["alive", "lost True"], done.stderr[-2000:]
