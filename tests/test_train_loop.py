"""The loop that synthetic tasks share: batches, learning rates, and what is captured on a GPU, run without capture."""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrm_recall.train.batches import IGNORE, Split, Splits, from_labels, padded
from lrm_recall.train.device import Gate, turn
from lrm_recall.train.graph import GraphLoop
from lrm_recall.train.grid import mqar_runs
from lrm_recall.train.learner import Learner
from lrm_recall.train.loop import fit, logits_of_questions
from lrm_recall.train.optimise import FitSettings
from lrm_recall.train.plain import PlainLoop
from lrm_recall.train.start import initial_model
from lrm_recall.train.synthetic import MQARRun, mqar_splits, run_mqar

RUN = MQARRun(mixer="baseconv", mixer_args={"max_length": 16}, d_model=16, num_layers=2, vocab_size=32, input_length=16,
              num_kv_pairs=2, num_train=130, num_valid=70, num_test=60, batch_size=50, learning_rate=5e-3, max_epochs=2,
              resona={"layers": [0], "chunk_size": 2})
SETTINGS = {"learning_rate": 1e-2, "batch_size": 8, "max_epochs": 4}


class Uncaptured:
    """Stands in for the Recorder: as many runs before, and then the work itself."""

    def __init__(self):
        self.recorded = 0

    def record(self, work):
        self.recorded += 1
        for _ in range(3):
            work()
        return work


def untrained():
    return initial_model(RUN.to_model_config(), RUN.seed)


def ragged(num: int, seed: int) -> Split:
    """Examples that ask 1 to 5 questions: name the token before."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 32, (num, 16), generator=generator)
    asked = torch.arange(16) >= torch.randint(11, 16, (num, 1), generator=generator)
    return from_labels(inputs, inputs.roll(1, 1).where(asked, torch.tensor(IGNORE)))


# --- batches


@given(st.integers(1, 9), st.integers(1, 7), st.randoms(use_true_random=False))
def test_labels_become_questions_in_order(rows, length, random):
    labels = torch.tensor([[random.choice((IGNORE, 3, 5)) for _ in range(length)] for _ in range(rows)])
    labels[0, 0] = 7  # something is asked
    inputs = torch.arange(rows * length).view(rows, length)
    split = from_labels(inputs, labels)
    assert split.positions.shape == split.answers.shape == (rows, int((labels != IGNORE).sum(1).max()))
    for row in range(rows):
        asked = split.answers[row] != IGNORE
        expected = (labels[row] != IGNORE).nonzero().flatten()
        assert split.positions[row][asked].tolist() == expected.tolist()
        assert split.answers[row][asked].tolist() == labels[row][expected].tolist()
        assert asked.tolist() == sorted(asked.tolist(), reverse=True)  # padding behind


@given(st.integers(1, 20), st.integers(1, 9))
def test_filling_asks_nothing(num, batch_size):
    split = ragged(num, 0)
    full = padded(split, batch_size)
    assert len(full.inputs) == -(-num // batch_size) * batch_size
    assert all(torch.equal(mine[:num], theirs) for mine, theirs in zip(full, split, strict=True))
    assert (full.answers[num:] == IGNORE).all()


# --- learning rates


@given(st.floats(0, 0.9), st.floats(0, 1), st.sampled_from(["cosine", "constant"]))
def test_rates_rise_and_fall(warmup, final, schedule):
    settings = FitSettings(**SETTINGS, warmup=warmup, final_rate=final, schedule=schedule)
    rates = [settings.rate(step / 100) for step in range(101)]
    assert all(0 <= rate <= 1e-2 * (1 + 1e-12) for rate in rates)
    rising = [rate for step, rate in enumerate(rates) if step / 100 < warmup]
    falling = [rate for step, rate in enumerate(rates) if step / 100 >= warmup]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert rates[-1] == pytest.approx(1e-2 * (1.0 if schedule == "constant" else final), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_rate": 1.5}, "final_rate is a share of learning_rate, from 0 to 1, got 1.5"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above zero or None, got 0.0"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, got 'linear'"),
        ({"precision": "fp16"}, "precision must be one of fp32, tf32, bf16, got 'fp16'"),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**SETTINGS, **change)


# --- the step that a GPU captures


@pytest.mark.parametrize("splits", [mqar_splits(RUN), Splits(ragged(130, 0), ragged(70, 1), ragged(60, 2))])
def test_the_captured_step_trains_as_the_plain_loop(splits):
    settings, models = RUN.to_fit_settings(), (untrained(), untrained())
    plain = PlainLoop(settings, models[0], splits.train, logits_of_questions)
    graph = GraphLoop(settings, models[1], splits, logits_of_questions, Uncaptured())
    for _ in range(2):
        assert graph.epoch() == pytest.approx(plain.epoch(), rel=1e-6)
        for split in (splits.valid, splits.test):
            (answers, loss), (expected, expected_loss) = graph.predict(split), plain.predict(split)
            assert torch.equal(answers, expected) and loss == pytest.approx(expected_loss, rel=1e-6)
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_runs_before_the_capture_leave_no_trace():
    model, recorder = untrained(), Uncaptured()
    loop = GraphLoop(RUN.to_fit_settings(), model, mqar_splits(RUN), logits_of_questions, recorder)
    assert recorder.recorded == 2  # a step, and one way to answer for two splits of the same shape
    assert all(map(torch.equal, model.parameters(), untrained().parameters()))
    states = [tensor for state in loop._learner.optimizer.state.values() for tensor in state.values()]
    assert states and all(not tensor.any() for tensor in states)
    assert not loop._step.any()


def test_answers_come_from_the_parameters_as_they_are():
    """Mamba2 keeps its rates between answers; a replay changes parameters without a trace in their version."""
    run = replace(RUN, mixer="mamba2", mixer_args={"head_dim": 16, "state_size": 8}, resona=None, embedding_range=1.0)
    model, splits = initial_model(run.to_model_config(), 0), mqar_splits(run)
    for block in model.model.layers:
        block.mixer.out_proj.weight.data.mul_(300.0)  # so that the mixer has a say, and in it the state
        block.mixer.D.data.zero_()
    loop = GraphLoop(run.to_fit_settings(), model, splits, logits_of_questions, Uncaptured())
    before = loop.predict(splits.valid)[1]
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(5.0)
    loss = loop.predict(splits.valid)[1]
    expected = PlainLoop(run.to_fit_settings(), deepcopy(model), splits.train, logits_of_questions)
    assert loss == pytest.approx(expected.predict(splits.valid)[1], rel=1e-7) != before


def test_a_copy_in_bf16_computes_and_fp32_parameters_learn():
    run = replace(RUN, mixer="attention", mixer_args={"num_heads": 1})
    settings, splits = replace(run.to_fit_settings(), precision="bf16"), mqar_splits(run)
    models = [initial_model(run.to_model_config(), 0) for _ in range(3)]
    seen = set()

    def logits(model, batch):
        seen.update(parameter.dtype for parameter in model.parameters())
        return logits_of_questions(model, batch)

    graph = GraphLoop(settings, models[0], splits, logits, Uncaptured())
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    plain = PlainLoop(settings, models[1], splits.train, logits)
    exact = PlainLoop(run.to_fit_settings(), models[2], splits.train, logits_of_questions)
    for _ in range(2):
        loss = plain.epoch()
        assert graph.epoch() == pytest.approx(loss, rel=1e-4)
        assert exact.epoch() == pytest.approx(loss, rel=1e-2)
    assert graph.predict(splits.valid)[1] == pytest.approx(exact.predict(splits.valid)[1], rel=1e-2)
    assert seen == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in models[0].parameters())
    assert any(not torch.equal(parameter, parameter.bfloat16().float()) for parameter in models[0].parameters())


@pytest.mark.parametrize("mixer", ["baseconv", "hyena"])
def test_filters_of_the_lag_stay_fp32(mixer):
    (run,) = mqar_runs(mixers=[mixer], lengths={16: 2}, d_models=[16], variants=["base"], learning_rates=[5e-3],
                       settings={"vocab_size": 32, "num_train": 130, "num_valid": 40, "num_test": 40, "max_epochs": 2})
    model = initial_model(run.to_model_config(), 0)
    learner = Learner(replace(run.to_fit_settings(), precision="bf16"), model, logits_of_questions)
    dtypes = {name: parameter.dtype for name, parameter in learner._computes.named_parameters()}
    part = ".conv.mlp." if mixer == "baseconv" else ".filter_fn."
    assert {dtype for name, dtype in dtypes.items() if part in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if part not in name} == {torch.bfloat16}
    filters = {name: tensor for name, tensor in model.state_dict().items() if part in name or ".pos_emb." in name}
    copied = learner._computes.state_dict()
    assert filters and all(torch.equal(tensor, copied[name]) for name, tensor in filters.items())
    rough, exact = (run_mqar(replace(run, precision=precision))["history"][-1] for precision in ("bf16", "fp32"))
    assert rough["train_loss"] == pytest.approx(exact["train_loss"], rel=1e-2)
    assert rough["train_loss"] != exact["train_loss"]


def test_a_single_step_on_fewer_examples_than_a_batch():
    settings = FitSettings(**SETTINGS | {"max_epochs": 1})
    splits = Splits(ragged(5, 0), ragged(3, 1), ragged(9, 2))
    plain = PlainLoop(settings, untrained(), splits.train, logits_of_questions)
    graph = GraphLoop(settings, untrained(), splits, logits_of_questions, Uncaptured())
    assert graph.epoch() == pytest.approx(plain.epoch(), rel=1e-6)
    assert [len(graph.predict(split)[0]) for split in (splits.valid, splits.test)] == [3, 9]


def test_fit_scores_ragged_questions():
    splits = Splits(ragged(64, 0), ragged(20, 1), ragged(10, 2))
    asked = []

    def score(predictions, answers):
        asked.append((predictions.shape, answers.shape))
        return (predictions == answers)[answers != IGNORE].float().mean().item()

    settings = FitSettings(**SETTINGS, max_grad_norm=None, schedule="constant")
    fitted = fit(settings, untrained(), splits, logits_of_questions, score)
    assert [epoch["epoch"] for epoch in fitted.history] == [1, 2, 3, 4]
    assert fitted.history[-1]["train_loss"] < fitted.history[0]["train_loss"]
    assert asked == [(splits.valid.answers.shape,) * 2] * 4
    assert fitted.predictions.shape == splits.test.answers.shape and fitted.test_loss > 0


# --- turns


def test_a_gate_is_closed_only_when_nobody_passes():
    gate, inside, seen = Gate(), [], []

    def pass_through(index):
        for _ in range(200):
            with gate.passing():
                inside.append(index)
                seen.append(len(inside))
                inside.remove(index)

    threads = [threading.Thread(target=pass_through, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        with gate.closed():
            assert not inside
    for thread in threads:
        thread.join()
    assert len(seen) == 800
    with gate.passing(), gate.passing():  # side by side
        pass


def test_a_turn_sets_the_precision_for_itself_alone():
    before = torch.get_float32_matmul_precision()
    order = []

    def other():
        with turn("tf32"):
            order.append(("other", torch.get_float32_matmul_precision()))

    with turn("fp32"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append(("first", torch.get_float32_matmul_precision()))
    thread.join()
    assert order == [("first", "highest"), ("other", "high")]
    assert torch.get_float32_matmul_precision() == before
