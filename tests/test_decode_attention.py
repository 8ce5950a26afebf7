"""A Transformer decoded on buffers with room for more keys and values, run here as they are, without a graph."""

import copy
import weakref

import pytest
import torch
from conftest import VOCAB
from decoding_checks import WithoutGraph, generated, ids

from lrm_recall import RecurrentLM, RecurrentLMConfig, decode
from lrm_recall.decode import Step, can_capture
from lrm_recall.mixers import attention

KINDS = {
    "plain": {"num_heads": 2},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "bias": True},
    "no positions": {"num_heads": 2, "num_kv_heads": 1, "rotary": False},
}


def make(mixer_args, **changes):
    torch.manual_seed(1)
    config = RecurrentLMConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, mixer="attention",
                               mixer_args=mixer_args, initializer_range=0.3, pad_token_id=0, **changes)  # fmt: skip
    model = RecurrentLM(config).eval()
    model._decoder = WithoutGraph()
    return model


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(decode, "_LEAST_ROOM", 4)  # of 8, 16, ... tokens


@pytest.fixture(params=KINDS)
def model(request):
    return make(KINDS[request.param])


@pytest.fixture
def plain():
    return make(KINDS["plain"])


def prefilled(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, use_cache=True, **options).past_key_values


def stepped(model, tokens, cache):
    """Logits [B, T, V] of tokens [B, T], one by one."""
    with torch.no_grad():
        steps = [model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]
    return torch.cat(steps, dim=1)


def same(cache, expected):
    assert cache.length == expected.length and cache.nbytes() == expected.nbytes()
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert ours.keys() == theirs.keys()
        for name, state in ours.items():
            torch.testing.assert_close(state, theirs[name], rtol=1e-4, atol=1e-4)


def close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", [(2, 1), (2, 3), (3, 31)])
def test_the_tokens_of_the_plain_loop(model, prompt):
    expected = generated(model, ids(*prompt), graph=False)
    assert expected[:, prompt[1] :].unique().numel() > 3  # not one token for ever
    assert torch.equal(generated(model, ids(*prompt), graph=True), expected)
    assert 1 < model._decoder.made < 6  # again whenever the buffers were full


def test_the_logits_of_the_full_forward_and_the_cache_of_the_plain_loop(model):
    tokens, mask = ids(3, 30), torch.ones(3, 30, dtype=torch.int64)
    mask[0, :5], mask[2, :8] = 0, 0  # of the third, one token of the prompt is real
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, use_cache=False).logits
    caches = [prefilled(model, tokens[:, :9], attention_mask=mask[:, :9]) for _ in range(2)]
    close(stepped(model, tokens[:, 9:], caches[0]), full[:, 9:])
    assert model._decoder.made
    model.cuda_graph = False
    close(stepped(model, tokens[:, 9:], caches[1]), full[:, 9:])
    same(*caches)


class WarmedUp(Step):
    """As a graph, which runs a few steps on its buffers before it is captured."""

    def __init__(self, model, cache):
        super().__init__(model, cache)
        with torch.inference_mode(False), torch.no_grad():
            for _ in range(decode._WARM_UP):
                self._run(model)


@pytest.mark.parametrize("resona", [None, {"layers": [0], "chunk_size": 3}])
def test_the_steps_before_a_capture_leave_no_trace(resona, monkeypatch):
    model, prompt = make(KINDS["plain"], resona=resona), ids(2, 11)
    monkeypatch.setattr(model._decoder, "_capture", WarmedUp)
    expected = generated(model, prompt, graph=False)
    with torch.inference_mode():
        assert torch.equal(generated(model, prompt, graph=True), expected)
    cache = prefilled(model, prompt)
    before = copy.deepcopy(cache)
    WarmedUp(model, cache)
    same(cache, before)


def test_a_row_that_has_not_begun(model):
    tokens, mask = ids(2, 20), torch.ones(2, 6, dtype=torch.int64)
    mask[0] = 0
    cache = prefilled(model, tokens[:, :6], attention_mask=mask)
    logits = stepped(model, tokens[:, 6:], cache)
    with torch.no_grad():
        close(logits[:1], model(tokens[:1, 6:], use_cache=False).logits)


def test_beam_search(model):
    prompt, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :5] = 0
    expected = generated(model, prompt, graph=False, mask=mask, num_beams=3)
    assert torch.equal(generated(model, prompt, graph=True, mask=mask, num_beams=3), expected)


def test_pieces_between_and_the_plain_loop_after(plain):
    tokens = ids(2, 40)
    with torch.no_grad():
        full = plain(tokens, use_cache=False).logits
        cache = prefilled(plain, tokens[:, :6])
        for piece in (1, 1, 5, 1, 1, 7, 1, 1):
            plain.cuda_graph = cache.length < 25
            start = cache.length
            close(plain(tokens[:, start : start + piece], past_key_values=cache).logits, full[:, start : start + piece])


def test_caches_in_turn_copied_cropped_and_cut(plain):
    tokens = ids(3, 30)
    with torch.no_grad():
        full = plain(tokens, use_cache=False).logits
    first, other = prefilled(plain, tokens[:, :9]), prefilled(plain, tokens[:, :5])
    close(stepped(plain, tokens[:, 9:12], first), full[:, 9:12])
    twin, shallow = copy.deepcopy(first), copy.copy(prefilled(plain, tokens[:, :12]))
    close(stepped(plain, tokens[:, 5:8], other), full[:, 5:8])  # takes the buffers from the first
    close(stepped(plain, tokens[:, 12:14], twin), full[:, 12:14])
    close(stepped(plain, tokens[:, 12:14], first), full[:, 12:14])
    close(stepped(plain, tokens[:, 12:14], shallow), full[:, 12:14])

    for layer in first.layers:  # back to ten tokens
        for name in layer:
            layer[name] = layer[name][:, :, :10]
    first.length = 10
    close(stepped(plain, tokens[:, 10:13], first), full[:, 10:13])
    first.reorder_cache(torch.tensor([2, 0]))
    close(stepped(plain, tokens[[2, 0], 13:15], first), full[[2, 0], 13:15])
    close(stepped(plain, tokens[:, 8:11], other), full[:, 8:11])


def test_states_that_overlap_the_buffers_they_move_in(plain):
    """Without positions in the keys, leaving out the first tokens is a cache of the others."""
    model, tokens = make(KINDS["no positions"]), ids(1, 20)
    cache = prefilled(model, tokens[:, :6])
    stepped(model, tokens[:, 6:10], cache)
    for layer in cache.layers:
        for name in layer:
            layer[name] = layer[name][:, :, 3:]
    cache.length = 7
    expected = copy.deepcopy(cache)
    logits = stepped(model, tokens[:, 10:12], cache)
    model.cuda_graph = False
    close(logits, stepped(model, tokens[:, 10:12], expected))


def test_a_shallow_copy_keeps_its_keys_and_values(plain):
    tokens = ids(1, 12)
    cache = prefilled(plain, tokens[:, :6])
    kept = copy.copy(cache)
    states = [dict(layer) for layer in kept.layers]
    stepped(plain, tokens[:, 6:8], cache)
    assert all(layer[name] is state for layer, before in zip(kept.layers, states, strict=True)
               for name, state in before.items())  # fmt: skip


def test_a_layer_is_moved_before_the_next_has_buffers(plain, monkeypatch):
    """No more than one layer's keys and values exist twice, whether a cache is new or its buffers are full."""
    cache, buffer, references, alive = prefilled(plain, ids(1, 30)), Step._buffer, [], []

    def watched(self, layer, name, state):
        alive.append(sum(reference() is not None for reference in references))
        return buffer(self, layer, name, state)

    def watch():
        references[:] = [weakref.ref(state) for layer in cache.layers for state in layer.values()]
        if (step := plain._decoder._graph) is not None:
            references.extend(weakref.ref(buffer) for layer in step._states for buffer in layer.values())

    monkeypatch.setattr(Step, "_buffer", watched)
    watch()
    stepped(plain, ids(1, 10), cache)
    assert alive == [4, 4, 2, 2] and cache.length == plain._decoder._graph.capacity
    alive.clear()
    watch()
    stepped(plain, ids(1, 1), cache)
    assert alive == [8, 8, 4, 4] and plain._decoder._graph.capacity == 48  # and the buffers that they lay in


@pytest.mark.parametrize("failing", ["Step.__init__", "take"])
def test_an_error_on_the_way_loses_nothing(plain, failing, monkeypatch):
    tokens, others = ids(2, 20).split(1)
    with torch.no_grad():
        full, full_of_others = (plain(row, use_cache=False).logits for row in (tokens, others))
    cache, other = prefilled(plain, tokens[:, :9]), prefilled(plain, others[:, :11])
    if failing == "take":
        stepped(plain, others[:, 11:12], other)
    filled, calls = Step._filled, []

    def fails(self, layer, name, state):
        calls.append(name)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return filled(self, layer, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "_filled", fails)
        with pytest.raises(torch.OutOfMemoryError):
            stepped(plain, tokens[:, 9:10], cache)
    assert cache.length == 9
    start = other.length
    close(stepped(plain, others[:, start : start + 2], other), full_of_others[:, start : start + 2])
    close(stepped(plain, tokens[:, 9:12], cache), full[:, 9:12])


def test_a_cache_that_gave_its_states_keeps_them_when_another_is_decoded_first(plain):
    tokens, others = ids(2, 20).split(1)
    caches = [prefilled(plain, row[:, :9]) for row in (tokens, others)]
    before = copy.deepcopy(caches[0])
    step = Step(plain, caches[0])
    with torch.no_grad():
        step.step(plain, others[:, 9:10], caches[1])
    same(caches[0], before)


def test_without_the_kernel_a_mixed_dtype_is_taken(plain):
    """Under autocast the prompt's keys are bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        cache = prefilled(plain, ids(1, 9))
    assert cache.layers[0]["values"].dtype == torch.bfloat16
    expected = copy.deepcopy(cache)
    logits = stepped(plain, ids(1, 3), cache)
    plain.cuda_graph = False
    torch.testing.assert_close(logits, stepped(plain, ids(1, 3), expected), rtol=0.05, atol=0.05)


def test_a_window_needs_no_room_and_a_step_says_which_states_do():
    model = make({"num_heads": 2, "window": 4})
    assert can_capture(model) and model.model.layers[0].mixer.growing_states == {}
    assert make(KINDS["plain"]).model.layers[0].mixer.growing_states == {"keys": 2, "values": 2}
    with torch.no_grad():
        assert Step(model, prefilled(model, ids(2, 5))).has_room(2, 1 << 40)
    assert torch.equal(generated(model, ids(2, 7), graph=True), generated(model, ids(2, 7), graph=False))


def test_layers_of_both_kinds_in_one_model():
    model = make(KINDS["plain"], layer_overrides={"1": {"window": 4}})
    expected = generated(model, ids(2, 7), graph=False)
    assert torch.equal(generated(model, ids(2, 7), graph=True), expected)
    assert model._decoder.made > 1


def test_hymba_with_an_unlimited_window_is_not_captured():
    model = RecurrentLM(RecurrentLMConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, mixer="hymba",
                                          mixer_args={"attention_window_size": None}))  # fmt: skip
    assert not can_capture(model)


def test_a_step_calls_the_op_once_a_layer(plain, monkeypatch):
    seen, op = [], attention.attention_step
    monkeypatch.setattr(attention, "attention_step", lambda *args, **kwargs: seen.append(args) or op(*args, **kwargs))
    stepped(plain, ids(2, 3), prefilled(plain, ids(2, 9)))
    assert len(seen) == 2 * 3 and seen[0][3].shape == (2, 2, 16, 16)  # [B, G, C, K]


@pytest.mark.parametrize("most", [0, 10**9])
def test_large_buffers_go_with_their_cache_and_others_stay(plain, monkeypatch, most):
    monkeypatch.setattr(WithoutGraph, "_most_kept", lambda self, graph: most)
    tokens = ids(1, 12)
    cache = prefilled(plain, tokens[:, :6])
    first = stepped(plain, tokens[:, 6:], cache)
    assert plain._decoder._graph.growing_bytes() > 0
    del cache
    assert (plain._decoder._graph is None) == (most == 0)
    assert torch.equal(stepped(plain, tokens[:, 6:], prefilled(plain, tokens[:, :6])), first)
    assert plain._decoder.made == (2 if most == 0 else 1)


def test_an_error_after_the_step_loses_nothing(plain, monkeypatch):
    tokens = ids(1, 12)
    expected = stepped(plain, tokens[:, 6:], prefilled(plain, tokens[:, :6]))
    cache = prefilled(plain, tokens[:, :6])
    before = stepped(plain, tokens[:, 6:8], cache)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "project", lambda *_: (_ for _ in ()).throw(RuntimeError("too late")))
        with pytest.raises(RuntimeError, match="too late"):
            stepped(plain, tokens[:, 8:9], cache)
    assert torch.allclose(torch.cat([before, stepped(plain, tokens[:, 8:], cache)], 1), expected, atol=1e-5)
