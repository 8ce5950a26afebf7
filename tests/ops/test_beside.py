"""Retrieval beside the mixer: what each stream has behind it, on streams that only keep account, and what is left."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from torch import nn

from lrm_recall.decode import Step, can_capture
from lrm_recall.ops import beside as beside_module
from lrm_recall.ops.beside import beside, branch

X = SimpleNamespace(is_cuda=True, device="gpu")


class Stream:
    """Knows what was launched before its next operation, on it or on streams that it waited for."""

    def __init__(self):
        self.done, self.device = set(), "gpu"

    def record_event(self):
        return SimpleNamespace(done=set(self.done))

    def wait_event(self, event):
        self.done |= event.done

    def wait_stream(self, stream):
        self.done |= stream.done


class Device:
    """A main and a side stream; `before` has what each launch lies behind."""

    def __init__(self):
        self.main, self.side = Stream(), Stream()
        self.current, self.before = self.main, {}

    def launch(self, *names):
        for name in names:
            self.before[name] = set(self.current.done)
            self.current.done.add(name)

    @contextlib.contextmanager
    def stream(self, stream):
        outside, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outside

    def layer(self, name):
        """A Resona layer in its own words: its mixer launches one kernel."""
        layer = nn.Module()
        layer.mixer = nn.Identity()
        layer.mixer.register_forward_hook(lambda *_: self.launch(f"mixer {name}"))
        return layer

    def run(self, layer, name):
        self.launch(f"x {name}")
        layer.mixer(X)
        with branch(layer) as join:
            self.launch(f"retrieve {name}")
            join()
            self.launch(f"encode {name}")
        self.launch(f"mix {name}")


@pytest.fixture
def gpu(monkeypatch):
    gpu = Device()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(beside_module, "_side_stream", lambda device: gpu.side)
    return gpu


def test_two_branches_a_layer(gpu):
    layers = {name: gpu.layer(name) for name in "ab"}
    with beside(layers.values()):
        for name, layer in layers.items():
            gpu.run(layer, name)
    first = {"x a"}
    assert gpu.before["mixer a"] == gpu.before["retrieve a"] == first
    assert gpu.before["mix a"] == first | {"mixer a", "retrieve a"}  # and not the encoding
    assert {"mix a", "encode a"} <= gpu.before["retrieve b"]  # memory of the first layer's retrieval may be used again
    assert "mixer b" not in gpu.before["retrieve b"] and "encode a" not in gpu.before["mixer b"]
    assert gpu.main.done == set(gpu.before)  # behind it the length may change, and a capture end


def test_one_stream_where_nothing_was_opened_or_no_event_recorded(gpu):
    layer = gpu.layer("a")
    gpu.run(layer, "a")
    with beside([layer]), branch(layer) as join:  # its mixer did not run
        gpu.launch("alone")
        join()
    assert not gpu.side.done and gpu.before["retrieve a"] == {"x a", "mixer a"}
    assert list(gpu.before) == ["x a", "mixer a", "retrieve a", "encode a", "mix a", "alone"]


def test_a_layer_that_torch_takes_over_stays_out(gpu):
    layers = [gpu.layer("a"), gpu.layer("b")]
    with beside(layers):
        for layer in layers:
            layer.mixer(X)
    assert not gpu.side.done
    with beside(layers), branch(layers[0]):  # the event of the first time is gone
        gpu.launch("later")
    assert not gpu.side.done


@pytest.mark.parametrize("launched", ["before the join", "after the join"])
def test_an_error_leaves_one_stream_and_no_hook(gpu, launched):
    layer = gpu.layer("a")
    with pytest.raises(RuntimeError, match="halfway"), beside([layer]):
        layer.mixer(X)
        with branch(layer) as join:
            if launched == "after the join":
                join()
            gpu.launch("retrieve")
            raise RuntimeError("halfway")
    assert "retrieve" in gpu.main.done and not beside_module._forks and not layer.mixer._forward_pre_hooks
    gpu.run(layer, "again")
    assert "again" not in "".join(gpu.side.done)


@torch.no_grad()
def test_a_step_on_a_cpu_touches_no_stream_and_leaves_no_hook(monkeypatch):
    model = make_model("gla", "mean")  # both layers
    seen, mixer = [], model.model.layers[1].mixer.mixer

    def refuse(*_):
        raise AssertionError("a stream on a CPU")

    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    monkeypatch.setattr(torch.cuda, "stream", refuse)
    ids = torch.randint(1, 64, (1, 9))
    cache = model(ids, use_cache=True).past_key_values
    step, forward = Step(model, cache), mixer.forward
    monkeypatch.setattr(mixer, "forward", lambda *x: seen.append(can_capture(model)) or forward(*x))
    step.step(model, ids[:, :1], cache)
    assert seen == [False] and can_capture(model)  # hooks there while it runs, and only then
    monkeypatch.setattr(mixer, "forward", refuse)
    with pytest.raises(AssertionError, match="a stream"):
        step.step(model, ids[:, :1], cache)
    assert can_capture(model) and not beside_module._forks
