"""Language models trained on a GPU by replay: the losses and gradients of training kernel by kernel."""

import warnings
from dataclasses import replace

import pytest
import torch
from closeness import assert_close
from lm_small import WITH_RESONA, small_cache, small_run
from torch import nn

from lrm_recall import RecurrentLM, RecurrentLMConfig
from lrm_recall.train.language_model import run_lm
from lrm_recall.train.lm_graph import ReplayedPass, ReplayedStep
from lrm_recall.train.lm_trainer import LMTrainer

MIXERS = {
    "gla": {"num_heads": 2}, "deltanet": {"num_heads": 2}, "retnet": {"num_heads": 2}, "mamba": {},
    "hymba": {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_window_size": 16},
    "gated_deltanet": {"num_heads": 2, "head_dim": 16},
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield small_cache(tmp_path_factory.mktemp("lm"), patch)


def trained(run, replays: bool, number: int) -> list[tuple[float, float]]:
    """Losses and norms of the gradient; `number` makes it a run of its own in the cache."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message="training kernel by kernel")
        patch.setattr(LMTrainer, "replays", replays)
        history = run_lm(replace(run, weight_decay=0.01 + number * 1e-15), device="cuda")["history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


@pytest.mark.parametrize("variant", [{}, WITH_RESONA])
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_losses_of_a_run(corpus, mixer, variant):
    run = small_run(corpus, mixer=mixer, mixer_args=MIXERS[mixer], hidden_size=32, **variant)
    assert_histories_agree(trained(run, True, 1), trained(run, False, 2))


@pytest.mark.parametrize("change", [{"bf16": True}, {"bf16": True, **WITH_RESONA}, {"accumulation": 2},
                                    {"packed": True}])  # fmt: skip
def test_the_losses_of_other_runs(corpus, change):
    run = small_run(corpus, hidden_size=32, **change)
    assert_histories_agree(trained(run, True, 1), trained(run, False, 2), 2e-2 if run.bf16 else 1e-3)


def test_chunks_found_before_are_checked_on_the_host(corpus):
    run = small_run(corpus, hidden_size=32, **WITH_RESONA, chunks="tf_idf")
    with pytest.warns(UserWarning, match="training kernel by kernel"):
        result = run_lm(run, device="cuda")
    mine = [(entry["loss"], entry["grad_norm"]) for entry in result["history"] if "loss" in entry]
    assert_histories_agree(mine, trained(run, False, 2))


def test_a_run_goes_on_from_its_checkpoint(corpus):
    class Killed(Exception):
        pass

    def kill(entry):
        if entry["step"] == 10:
            raise Killed

    run = small_run(corpus, hidden_size=32, seed=5)
    with pytest.raises(Killed):
        run_lm(run, progress=kill, device="cuda")
    history = run_lm(run, device="cuda")["history"]
    again = [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    assert_histories_agree(again, trained(run, True, 3))


def assert_histories_agree(mine, theirs, tolerance=1e-3):
    assert len(mine) == len(theirs) > 1
    assert_close(torch.tensor(mine), torch.tensor(theirs), tolerance)


def small_model() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = RecurrentLM(RecurrentLMConfig(vocab_size=64, mixer="gla", mixer_args={"num_heads": 2}, hidden_size=32,
                                          num_hidden_layers=2)).cuda()
    return model, {"ids": torch.randint(0, 64, (2, 96), device="cuda")}


def pass_of(model):
    def forward_backward(batch):
        loss = model(input_ids=batch["ids"], labels=batch["ids"]).loss
        loss.backward()
        return loss.detach()

    return forward_backward


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_gradients_are_added_to_those_that_are_there():
    model, batch = small_model()
    other = {"ids": batch["ids"].flip(0, 1)}
    eager, replayed = pass_of(model), ReplayedPass(pass_of(model), model.parameters())
    expected = eager(batch), eager(other)
    sums = gradients(model)
    for emptied in (False, True):  # the second begins with the buffers of the graph
        model.zero_grad(set_to_none=not emptied)
        losses = replayed(batch), replayed(other)
        for mine, theirs in zip((*losses, *gradients(model)), (*expected, *sums), strict=True):
            assert_close(mine, theirs)
    model.zero_grad()
    replayed.close()
    assert_close(replayed(batch), expected[0])


def test_it_takes_the_shapes_of_the_first_call():
    model, batch = small_model()
    replayed = ReplayedPass(pass_of(model), model.parameters())
    replayed(batch)
    with pytest.raises(ValueError, match=r"captured for ids \(2, 96\), got \(2, 95\)"):
        replayed({"ids": batch["ids"][:, 1:]})


def test_what_cannot_be_captured_runs_kernel_by_kernel():
    model, batch = small_model()

    def training_step(model, inputs, num_items):
        loss = pass_of(model)(inputs)
        assert loss.item() > 0  # the host waits, which a capture forbids
        return loss

    step = ReplayedStep(training_step)
    with pytest.warns(UserWarning, match="training kernel by kernel, several times slower"):
        first = step(model, batch, torch.tensor(1))
    mine = gradients(model)
    model.zero_grad()
    assert_close(step(model, batch, torch.tensor(1)), first)
    for one, other in zip(mine, gradients(model), strict=True):
        assert_close(one, other)
