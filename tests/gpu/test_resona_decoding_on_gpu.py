"""Resona models decoded through a CUDA graph, by the fused step or in torch, give what the plain loop gives."""

import contextlib
import copy

import pytest
import torch

from lrm_recall import RecurrentLM, RecurrentLMConfig, decode
from lrm_recall.ops import beside as beside_module
from lrm_recall.ops.libraries import own
from lrm_recall.resona import layer as resona_layer

VOCAB, NEW = 128, 24
ARGS = {
    "gla": {"num_heads": 2},
    "mamba2": {"head_dim": 32, "state_size": 32},
    "deltanet": {"num_heads": 2},
}
RETRIEVAL = {
    "place, k 1": {"encoder": "place", "top_k": 1},
    "place, k 4": {"encoder": "place", "top_k": 4, "num_heads": 4, "alpha": "learned"},
    "linear, k 1": {"encoder": "linear", "top_k": 1, "num_heads": 2, "encoder_dim": 24},
    "linear, k 4": {"encoder": "linear", "top_k": 4, "num_heads": 2, "gate": "none", "memory_norm": False},
}


def make(mixer="gla", **resona):
    torch.manual_seed(0)
    config = RecurrentLMConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=3, mixer=mixer, mixer_args=ARGS[mixer],
        resona={"layers": [0, 2], "chunk_size": 8, **resona}, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return RecurrentLM(config).cuda().eval()


@pytest.fixture(params=[(mixer, name) for mixer in ARGS for name in RETRIEVAL], ids=": ".join)
def model(request):
    mixer, name = request.param
    return make(mixer, **RETRIEVAL[name])


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Calls of the fused step so far: while warming up and capturing, none in a replay."""
    calls = []

    def count(*arguments):
        calls.append(arguments[0].shape[0])
        return own.resona_step(*arguments)

    fusion = resona_layer.fusion
    monkeypatch.setattr(resona_layer, "fusion", lambda name, x: count if name == "resona_step" else fusion(name, x))
    return calls


def ids(*shape, seed=1):
    return torch.randint(1, VOCAB, shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def generated(model, prompt, graph, mask=None, new=NEW, **options):
    model.cuda_graph = graph
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("prompt", [(1, 3), (1, 8), (2, 70), (6, 30)])  # below a chunk; 6 rows: torch in the graph
def test_same_tokens_as_the_plain_loop(model, prompt, fused):
    expected = generated(model, ids(*prompt), graph=False)
    assert not fused and expected[:, prompt[1] :].unique().numel() > 3  # not one token for ever
    assert torch.equal(generated(model, ids(*prompt), graph=True), expected)
    assert model._decoder._graph is not None and len(fused) == 2 * 3  # two layers; two warm-ups and the capture


def test_torch_in_the_graph(model, monkeypatch):
    monkeypatch.setattr(resona_layer, "fusion", lambda name, x: None)
    prompt = ids(2, 20)
    assert torch.equal(generated(model, prompt, graph=True), generated(model, prompt, graph=False))


def test_rows_padded_on_the_left(model):
    prompt, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.int64, device="cuda")
    mask[0, :7], mask[2, :19] = 0, 0
    expected = generated(model, prompt, graph=False, mask=mask)
    assert torch.equal(generated(model, prompt, graph=True, mask=mask), expected)


def test_beam_search(model):
    prompt = ids(1, 20)
    expected = generated(model, prompt, graph=False, num_beams=3)
    assert torch.equal(generated(model, prompt, graph=True, num_beams=3), expected)


def test_past_the_capacity_of_the_buffers(model, monkeypatch, fused):
    monkeypatch.setattr(decode, "_LEAST_ROOM", 5)  # buffers of a multiple of 10 tokens
    prompt = ids(2, 19)
    expected = generated(model, prompt, graph=False)
    assert torch.equal(generated(model, prompt, graph=True), expected)
    assert len(fused) == 3 * 2 * 3  # captures for 30, 40 and 50 tokens
    assert model._decoder._graph.capacity == 50


def test_two_caches_in_turn_with_longer_inputs_between(model):
    pieces = [1, 1, 5, 1, 1, 1, 9, 1]
    rows = [torch.cat([ids(1, length, seed=length), ids(1, sum(pieces), seed=9)], 1) for length in (6, 17)]

    def run(graph):
        model.cuda_graph, logits = graph, []
        caches = [model(row[:, : -sum(pieces)], use_cache=True).past_key_values for row in rows]
        for piece in pieces:
            for row, cache in zip(rows, caches, strict=True):
                new = row[:, cache.length : cache.length + piece]
                logits.append(model(new, past_key_values=cache).logits)
        return logits

    with torch.no_grad():
        for ours, plain in zip(run(True), run(False), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_steps_beside_the_graph_that_change_states_in_place(model):
    prompt, rest = ids(1, 12), ids(1, 9, seed=2)

    def run(graph):
        model.cuda_graph, logits = graph, []
        cache = model(prompt, use_cache=True).past_key_values
        for t in range(9):
            mask = torch.ones(1, 13 + t, device="cuda") if t % 3 == 2 else None  # with a mask nothing is replayed
            logits.append(model(rest[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    with torch.no_grad():
        torch.testing.assert_close(run(True), run(False), rtol=1e-3, atol=1e-3)


def test_a_batch_cut_in_the_middle(model):
    prompt = ids(3, 20)
    rows = generated(model, prompt, graph=False)[:, 20:]
    model.cuda_graph = True
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        for t in range(4):
            model(rows[:, t : t + 1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1]))
        logits = model(rows[1:2, 4:5], past_key_values=cache).logits
    assert torch.equal(logits[:, -1].argmax(-1), rows[1:2, 5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("retrieval", RETRIEVAL)
def test_half_precision_follows_the_full_forward(dtype, retrieval):
    model = make("gla", **RETRIEVAL[retrieval])
    tokens = ids(1, 90)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        model.to(dtype)
        cache, errors = model(tokens[:, :40], use_cache=True).past_key_values, []
        half = model(tokens, use_cache=False).logits.float()  # what the dtype itself leaves, the choice of chunks too
        for t in range(40, 90):
            logits = model(tokens[:, t : t + 1], past_key_values=cache).logits
            errors.append(logits.float() - full[:, t : t + 1])
    error = torch.cat(errors, 1).norm() / full[:, 40:].norm()
    assert error < 2 * (half[:, 40:] - full[:, 40:]).norm() / full[:, 40:].norm() + 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("retrieval", RETRIEVAL)
@torch.no_grad()
def test_retrieval_beside_the_mixer_gives_the_same_bits(dtype, retrieval, monkeypatch):
    model = make("gla", layers=[0, 1, 2], **RETRIEVAL[retrieval]).to(dtype)
    tokens, streams, side_stream = ids(2, 60), [], beside_module._side_stream
    prompt = model(tokens[:, :20], use_cache=True).past_key_values
    monkeypatch.setattr(beside_module, "_side_stream", lambda device: streams.append(device) or side_stream(device))

    def logits():
        model._decoder = decode.Decoder()  # captures anew
        cache = copy.deepcopy(prompt)
        return torch.cat([model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(20, 60)], 1)

    forked = logits()
    assert len(streams) == 3 * 3  # layers; two warm-ups and the capture
    with monkeypatch.context() as patch:
        patch.setattr(decode, "beside", lambda layers: contextlib.nullcontext())
        assert torch.equal(logits(), forked)
    assert len(streams) == 3 * 3
    assert torch.equal(logits(), forked)  # and once more, in memory that both have used
