"""Resona alone, around plain modules: against a literal T x T reading of the paper's Algorithms 2 and 3."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrm_recall.context import Context
from lrm_recall.resona import integrate, search
from lrm_recall.resona.layer import Resona
from lrm_recall.resona.memory import DenseMemory, TokenMemory

GATES, ENCODERS, ALPHAS = ("null_chunk", "none"), ("mean", "place", "linear"), (0.5, "learned")


def dense_resona(layer: Resona, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Algorithms 1 to 3 with every mask written out, one row and one position at a time."""
    tokens = layer.memory_norm(memory)
    rows = []
    for hidden, past in zip(x, tokens, strict=True):
        mixed, outputs = layer.mixer(hidden[None])[0], []
        for t, query_state in enumerate(hidden):
            chunks = [past[n : n + layer.chunk_size] for n in range(0, t - layer.chunk_size + 1, layer.chunk_size)]
            if not chunks:
                outputs.append(mixed[t])
                continue
            q = layer.encoder.queries(query_state.view(1, 1, -1))[0, 0]
            c = layer.encoder.chunks(torch.stack(chunks)[None])[0]
            cosine = c @ q
            best = cosine.topk(min(layer.top_k, len(chunks))).indices
            query = layer.q_proj(query_state).view(layer.num_heads, -1)
            keys = [layer.k_proj(chunks[n]).view(layer.chunk_size, layer.num_heads, -1) for n in best]
            values = [layer.v_proj(chunks[n]).view(layer.chunk_size, layer.num_heads, -1) for n in best]
            scale = query.shape[-1] ** -0.5
            if layer.gate == "none":
                logits = torch.einsum("hd,uhd->hu", query, torch.cat(keys)) * scale
                output = torch.einsum("hu,uhd->hd", logits.softmax(-1), torch.cat(values))
            else:
                null = F.normalize(layer.null_chunk, dim=-1) @ q
                weights = (torch.cat([cosine[best], null[None]]) * layer.log_temperature.exp()).softmax(-1)
                output = 0
                for weight, key, value in zip(weights, keys, values, strict=False):
                    probs = (torch.einsum("hd,uhd->hu", query, key) * scale).softmax(-1)
                    output = output + weight * torch.einsum("hu,uhd->hd", probs, value)
            alpha = layer.alpha_proj(query_state).sigmoid() if layer.alpha == "learned" else layer.alpha
            outputs.append(alpha * mixed[t] + (1 - alpha) * layer.o_proj(output.flatten()))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def make_layer(hidden: int = 8, seed: int = 0, **options) -> Resona:
    torch.manual_seed(seed)
    layer = Resona(nn.Linear(hidden, hidden), hidden, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize(("gate", "encoder", "alpha"), list(itertools.product(GATES, ENCODERS, ALPHAS)))
@pytest.mark.parametrize(("length", "chunk_size", "top_k"), [(1, 2, 1), (2, 3, 1), (7, 2, 1), (12, 3, 2), (13, 4, 5)])
def test_equals_the_dense_reading_with_gradients(gate, encoder, alpha, length, chunk_size, top_k):
    layer = make_layer(chunk_size=chunk_size, top_k=top_k, gate=gate, encoder=encoder, alpha=alpha, num_heads=2)
    x, memory = torch.randn(2, 2, length, 8, requires_grad=True).unbind(0)
    weight = torch.randn(2, length, 8)
    results = []
    for forward in (lambda: layer(x, memory=memory), lambda: dense_resona(layer, x, memory)):
        output = forward()
        inputs = [x, memory, *layer.parameters()]
        results.append((output, *torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)))
    for ours, dense in zip(*results, strict=True):
        if dense is not None or (ours is not None and ours.abs().max() > 0):
            torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 20), chunk_size=st.integers(1, 6), top_k=st.integers(1, 4), gate=st.sampled_from(GATES),
       encoder=st.sampled_from(ENCODERS), seed=st.integers(0, 99))
def test_no_position_sees_its_future(length, chunk_size, top_k, gate, encoder, seed):
    layer = make_layer(seed=seed, chunk_size=chunk_size, top_k=top_k, gate=gate, encoder=encoder)
    x, memory = torch.randn(1, length, 8, requires_grad=True), torch.randn(1, length, 8, requires_grad=True)
    output = layer(x, memory=memory)
    for t in range(length):
        for gradient in torch.autograd.grad(output[0, t].sum(), (x, memory), retain_graph=True, allow_unused=True):
            assert gradient is None or gradient[0, t + 1 :].abs().sum() == 0


def test_a_chunk_is_seen_only_once_it_is_complete():
    assert search.visible_chunks(torch.arange(9), 3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_query_with_too_few_chunks_finds_none_with_a_score_of_zero():
    queries, chunks = torch.randn(1, 4, 8), torch.randn(1, 3, 8, requires_grad=True)
    indices, scores = search.chunk_search(queries, chunks, torch.tensor([[0, 1, 2, 3]]), 2)
    assert indices[0, :2].tolist() == [[-1, -1], [0, -1]] and indices.min(-1).values[0, 2:].ge(0).all()
    assert (scores[indices == search.NO_CHUNK] == 0).all()
    torch.testing.assert_close(scores[0, 1, 0], queries[0, 1] @ chunks[0, 0])
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), chunks)
    assert gradient.abs().sum() == 0


@pytest.mark.parametrize("gate", GATES)
def test_alpha_one_is_the_mixer_bit_for_bit(gate):
    layer = make_layer(chunk_size=2, alpha=1.0, gate=gate)
    x = torch.randn(2, 9, 8)
    assert torch.equal(layer(x), layer.mixer(x))


@pytest.mark.parametrize("encoder", ["place", "linear"])
def test_the_encoders_learn_only_through_the_gate(encoder):
    for gate in GATES:
        layer = make_layer(chunk_size=2, encoder=encoder, gate=gate)
        layer(torch.randn(1, 8, 8)).sum().backward()
        parameters = list(layer.encoder.parameters())
        learns = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters]
        assert all(learns) if gate == "null_chunk" else not any(learns)


def test_precomputed_chunks_give_what_the_search_gives():
    layer = make_layer(chunk_size=2, top_k=2)
    x = torch.randn(2, 11, 8)
    found = layer.retrieve(x).indices
    assert torch.equal(layer(x, Context(chunk_indices=found)), layer(x))


@pytest.mark.parametrize("bad", [1, -2])
def test_precomputed_chunks_must_lie_in_the_past(bad):
    layer = make_layer(chunk_size=2)
    indices = torch.full((1, 6, 1), -1)
    indices[0, 3, 0] = bad  # position 3 sees chunk 0 alone
    with pytest.raises(ValueError, match="wholly before"):
        layer(torch.randn(1, 6, 8), Context(chunk_indices=indices))


@pytest.mark.parametrize("gate", GATES)
def test_blocks_of_queries_change_nothing(gate, monkeypatch):
    layer = make_layer(chunk_size=2, top_k=2, gate=gate)
    x = torch.randn(2, 13, 8, requires_grad=True)
    whole = layer(x)
    expected = torch.autograd.grad(whole.square().sum(), [x, layer.k_proj.weight])
    monkeypatch.setattr(integrate, "_GATHERED_AT_ONCE", 200)
    monkeypatch.setattr(search, "_SCORES_AT_ONCE", 20)
    blocks = layer(x)
    torch.testing.assert_close(blocks, whole)
    gradients = torch.autograd.grad(blocks.square().sum(), [x, layer.k_proj.weight])
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_memory_from_ids_equals_memory_at_hand():
    embedding = nn.Embedding(20, 4)
    ids, offset = torch.randint(0, 20, (3, 10)), torch.tensor([0, 3, 9])
    dense, tokens = DenseMemory(embedding(ids), offset), TokenMemory(ids, embedding, offset)
    positions = torch.randint(0, 10, (3, 2, 5))
    assert torch.equal(dense.take(positions), tokens.take(positions))
    assert torch.equal(dense.slice(2, 7), tokens.slice(2, 7))
    assert torch.equal(dense.slice(0, 1)[1, 0], embedding(ids[1, 3]))


def test_bf16_stays_finite_and_close():
    layer = make_layer(hidden=16, chunk_size=2, top_k=2)
    x = torch.randn(2, 16, 16)
    found = layer.retrieve(x).indices
    full = layer(x, Context(chunk_indices=found))
    half = layer.bfloat16()(x.bfloat16(), Context(chunk_indices=found)).float()
    assert (half - full).norm() / full.norm() < 2e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 0}, "top_k must be at least 1, got 0"), ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
     ({"num_heads": 3}, "num_heads 3 does not divide the hidden size 8"), ({"alpha": 1.5}, "alpha must lie in"),
     ({"gate": "null"}, "'gate' must be"), ({"alpha": "1e-3"}, "'alpha' must be"),
     ({"chunk_size": 2.0}, "'chunk_size' must be int"), ({"encoder": "max"}, "'encoder' must be"),
     ({"encoder_dim": 3}, "needs encoder 'linear'"),
     ({"encoder": "linear", "encoder_dim": 0}, "encoder_dim must be")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Resona(nn.Identity(), 8, **options)


def test_option_names_and_types_are_checked():
    for options, message in [({"chunk": 2}, "did you mean 'chunk_size'"), ({"top_k": "1"}, "'top_k' must be int"),
                             ({"encoder": "men"}, "'encoder' must be"), ({"alpha": "1e-3"}, "'alpha' must be")]:
        with pytest.raises(ValueError, match=message):
            Resona.check_options(8, options)


@pytest.mark.parametrize("indices", [torch.full((2, 5, 1), -1), torch.full((2, 6), -1), torch.full((1, 6, 1), -1),
                                     torch.full((2, 6, 0), -1), torch.full((2, 6, 1), -1.0)])
def test_precomputed_chunks_of_another_shape(indices):
    with pytest.raises(ValueError, match="chunk_indices must be integers of shape"):
        make_layer(chunk_size=2)(torch.randn(2, 6, 8), Context(chunk_indices=indices))


def test_memory_of_another_shape():
    with pytest.raises(ValueError, match="memory must have the shape of x"):
        make_layer(chunk_size=2)(torch.randn(2, 6, 8), memory=torch.randn(2, 7, 8))


def test_a_foreign_mixer_has_no_known_state():
    with pytest.raises(ValueError, match="Linear is not a Mixer"):
        make_layer().state_size()
