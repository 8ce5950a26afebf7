"""Attention by chunk against attention by query."""

import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.resona import integrate
from lrm_recall.resona.grouped import grouped_chunk_attention
from lrm_recall.resona.integrate import attend, chunk_attention_torch
from lrm_recall.resona.search import NO_CHUNK, take_chunks


def gathered(queries, keys, values, indices, weights):
    return attend(queries, take_chunks(keys, indices), take_chunks(values, indices), indices, weights)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(1, 9), st.integers(1, 2),
       st.integers(1, 4), st.booleans(), st.integers(0, 2**16))  # fmt: skip
def test_equals_attention_by_query(B, T, N, U, k, H, gate, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(B, T, H, 4), (B, N, U, H, 4), (B, N, U, H, 4), (B, T, k)]
    leaves = [torch.randn(shape, dtype=torch.float64, generator=draw).requires_grad_() for shape in shapes]
    leaves = leaves[: 3 + gate]
    indices = torch.randint(NO_CHUNK, N, (B, T, k), generator=draw)  # duplicates and queries without a chunk among them
    results = []
    for function in (grouped_chunk_attention, gathered):
        out = function(*leaves[:3], indices, *(leaves[3:] or [None]))
        if out is None:  # too uneven
            return
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-12, least_scale=1e-9)


@pytest.mark.parametrize("gate", [True, False])
def test_a_query_without_a_chunk_gets_zero(gate):
    queries, keys = torch.randn(1, 3, 1, 4), torch.randn(1, 2, 8, 1, 4)
    indices = torch.tensor([[[0, 1], [-1, -1], [1, -1]]])
    out = grouped_chunk_attention(queries, keys, keys, indices, torch.rand(1, 3, 2) if gate else None)
    assert (out[:, 1] == 0).all() and (out[:, [0, 2]] != 0).any(-1).all()


def test_uneven_choices_go_by_query(monkeypatch):
    queries, keys = torch.randn(1, 40, 1, 4), torch.randn(1, 20, 8, 1, 4)
    indices = torch.full((1, 40, 1), 7)
    assert grouped_chunk_attention(queries, keys, keys, indices, None) is None
    expected = gathered(queries, keys, keys, indices, None)
    assert torch.equal(chunk_attention_torch(queries, keys, keys, indices, None), expected)


def test_long_chunks_go_by_chunk(monkeypatch):
    monkeypatch.setattr(integrate, "take_chunks", None)  # what goes by query needs
    queries, keys = torch.randn(1, 40, 1, 4), torch.randn(1, 4, 8, 1, 4)
    assert chunk_attention_torch(queries, keys, keys, torch.randint(4, (1, 40, 2)), None).shape == queries.shape
    with pytest.raises(TypeError):
        chunk_attention_torch(queries, keys[:, :, :7], keys[:, :, :7], torch.randint(4, (1, 40, 2)), None)
