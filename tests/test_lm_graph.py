"""What stands around a replayed pass, on a CPU: a recorder that does the work again takes the place of CUDA graphs.

tests/gpu/test_lm_replay_on_gpu.py has the graphs themselves.
"""

import contextlib

import pytest
import torch
from closeness import assert_close
from torch import nn

from lrm_recall.train import lm_graph
from lrm_recall.train.graph import CaptureError
from lrm_recall.train.lm_graph import ReplayedPass, ReplayedStep


class Again:
    """As a graph: the gradients of the capture are written over by every replay."""

    def record(self, work):
        work()
        made = [parameter.grad for parameter in MODEL.parameters()]

        def replay():
            work()
            for parameter, buffer in zip(MODEL.parameters(), made, strict=True):
                if buffer is not None:
                    buffer.copy_(parameter.grad)

        return replay

    def close(self):
        pass


class Refuses(Again):
    def record(self, work):
        raise CaptureError("it waits for the host")


MODEL = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2)])  # the second takes no part
BATCH, OTHER = ({"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1))


def forward_backward(batch):
    loss = MODEL[0](batch["x"]).square().mean()
    loss.backward()
    return loss.detach()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(lm_graph, "Recorder", Again)
    monkeypatch.setattr(lm_graph, "own_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    MODEL.zero_grad()


def gradients():
    return [parameter.grad.clone() for parameter in MODEL[0].parameters()]


@pytest.mark.parametrize("emptied", [False, True])
def test_gradients_are_added_to_those_that_are_there(emptied):
    losses = forward_backward(BATCH), forward_backward(OTHER)
    sums = gradients()
    replayed = ReplayedPass(forward_backward, MODEL.parameters())
    for _ in range(2):  # the second begins with the buffers of the graph
        MODEL.zero_grad(set_to_none=not emptied)
        again = replayed(BATCH), replayed(OTHER)
        for mine, theirs in zip((*again, *gradients()), (*losses, *sums), strict=True):
            assert_close(mine, theirs)
    assert MODEL[1].weight.grad is None


def test_a_capture_leaves_the_gradients_that_were_there():
    forward_backward(BATCH)
    before = gradients()
    ReplayedPass(forward_backward, MODEL.parameters())(OTHER)
    once = gradients()
    MODEL.zero_grad()
    forward_backward(OTHER)
    for sum_, one, other in zip(once, before, gradients(), strict=True):
        assert_close(sum_, one + other)


def test_layers_learn_that_what_they_have_kept_is_old():
    replayed = ReplayedPass(forward_backward, MODEL.parameters())
    replayed(BATCH)
    before = MODEL[0].weight._version
    replayed(BATCH)
    assert MODEL[0].weight._version > before


def test_other_shapes_are_refused():
    replayed = ReplayedPass(forward_backward, MODEL.parameters())
    replayed(BATCH)
    with pytest.raises(ValueError, match=r"captured for x \(4, 3\), got \(2, 3\)"):
        replayed({"x": BATCH["x"][:2]})


def test_closed_it_captures_anew():
    replayed = ReplayedPass(forward_backward, MODEL.parameters())
    first = replayed(BATCH)
    replayed.close()
    assert MODEL[0].weight.grad is None
    assert_close(replayed(BATCH), first)


def test_what_cannot_be_captured_runs_kernel_by_kernel_and_says_so_once(monkeypatch, recwarn):
    monkeypatch.setattr(lm_graph, "Recorder", Refuses)
    step = ReplayedStep(lambda model, inputs, num_items: forward_backward(inputs) / num_items)
    losses = [step(MODEL, BATCH, torch.tensor(2.0)) for _ in range(2)]
    assert_close(losses[0], losses[1])
    assert [str(warning.message) for warning in recwarn] == [
        "training kernel by kernel, several times slower: it waits for the host"]
