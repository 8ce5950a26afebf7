"""The search for the best chunks, against plain torch: choice, scores, gradients."""

import pytest
import torch
from chunk_search_checks import TOLERANCE, assert_forward_and_gradients, assert_found, drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrm_kernels.chunk_search import MOST_CHOSEN, chunk_search, chunk_search_reference, search_forward, tiles

# Triton's interpreter cuts to bf16 where a GPU rounds
GRADIENT = TOLERANCE if torch.cuda.is_available() else {**TOLERANCE, torch.bfloat16: 1e-2}


def on(device, inputs):
    return [x.to(device) for x in inputs]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("B", "T", "N", "E", "top_k"),
    [
        (2, 70, 130, 64, 4),
        (1, 1, 1, 1, 1),
        (1, 1, 70, 16, 3),  # one query
        (3, 65, 5, 20, 9),  # fewer chunks than k
        (1, 33, 40, 300, 2),  # more channels than one product takes
        (2, 17, 66, 100, MOST_CHOSEN),
    ],
)
def test_forward_and_gradients(device, dtype, B, T, N, E, top_k):
    assert_forward_and_gradients(on(device, drawn(dtype, B, T, N, E)), top_k, GRADIENT[dtype])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(1, 3), T=st.integers(1, 90), N=st.integers(0, 140), E=st.integers(1, 40),
    top_k=st.integers(1, MOST_CHOSEN), dtype=st.sampled_from(list(TOLERANCE)), stop_early=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_choice_is_exact_where_sums_are(device, B, T, N, E, top_k, dtype, stop_early, seed):
    """Small whole numbers add up without rounding, and tie all the time: the lower index must win."""
    generator = torch.Generator().manual_seed(seed)
    queries, chunks = (torch.randint(-1, 2, (B, length, E), generator=generator).to(device, dtype) for length in (T, N))
    visible = torch.randint(-1, N + 3, (B, T), generator=generator).to(device)
    sizes = tiles(dtype, E, top_k)._replace(stop_early=stop_early)
    indices, scores = search_forward(queries, chunks, visible, top_k, sizes)
    expected, best = chunk_search_reference(queries, chunks, visible, top_k)
    assert torch.equal(indices, expected) and torch.equal(scores, best)


@pytest.mark.parametrize("top_k", [1, 3, 16])
def test_equal_chunks_are_taken_in_order(device, top_k):
    queries = torch.arange(-10.0, 10.0, device=device)[None, :, None].expand(1, 20, 3)
    chunks = torch.ones(1, 1, 3, device=device)
    visible = 10 * torch.arange(20, device=device)[None]  # [1, T]
    indices, scores = chunk_search(queries, chunks.expand(1, 150, 3), visible, top_k)
    order = torch.arange(top_k, device=device)
    assert torch.equal(indices[0], torch.where(order < visible[0, :, None].clamp(max=150), order, -1))
    assert torch.equal(scores, scores[..., :1].expand_as(scores).masked_fill(indices == -1, 0.0))


@pytest.mark.parametrize("stop_early", [False, True])
def test_every_chunk_better_than_those_before_it(device, stop_early):
    """The worst order for a running choice: all that is kept is replaced again and again."""
    chunks = torch.arange(1, 201.0, device=device)[None, :, None].expand(1, 200, 3).contiguous()
    queries, visible = torch.ones(1, 70, 3, device=device), 3 * torch.arange(70, device=device)[None]
    sizes = tiles(torch.float32, 3, 5)._replace(stop_early=stop_early)
    indices, _ = search_forward(queries, chunks, visible, 5, sizes)
    expected = visible.clamp(max=200)[..., None] - 1 - torch.arange(5, device=device)  # [1, T, k]
    assert torch.equal(indices, expected.clamp(min=-1))


def test_one_count_for_all_rows_and_views_of_other_layouts(device):
    queries, chunks, visible = on(device, drawn(torch.float32, 3, 50, 30, 24))
    expected = chunk_search(queries, chunks, visible[:1].expand(3, -1).contiguous(), 4)
    layouts = {
        "one count": (queries, chunks, visible[:1]),
        "time first": (queries.transpose(0, 1).contiguous().transpose(0, 1), chunks, visible[:1]),
        "channels first": (queries.mT.contiguous().mT, chunks.mT.contiguous().mT, visible[:1]),
        "slices": (torch.cat([queries, queries], -1)[..., 24:], torch.cat([chunks, chunks], 1)[:, :30], visible[:1]),
    }
    for name, inputs in layouts.items():
        for actual, y in zip(chunk_search(*inputs, 4), expected, strict=True):
            assert torch.equal(actual, y), name
    assert_found(expected, [queries, chunks, visible[:1].expand(3, -1)], 4)


def test_one_chunk_for_all(device):
    queries, chunks, visible = on(device, drawn(torch.float32, 2, 150, 70, 16))
    assert_forward_and_gradients([queries, chunks, torch.ones_like(visible)], 4, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("T", "N"), [(5, 0), (0, 5), (5, 9)])
def test_nothing_to_be_found(device, T, N):
    queries, chunks, visible = on(device, drawn(torch.float32, 2, T, N, 8))
    queries.requires_grad_()
    chunks.requires_grad_()
    indices, scores = chunk_search(queries, chunks, torch.zeros_like(visible), 3)
    assert indices.shape == scores.shape == (2, T, 3) and (indices == -1).all() and (scores == 0).all()
    scores.sum().backward()
    assert not queries.grad.any() and not chunks.grad.any()


def test_what_is_not_a_number_is_not_chosen(device):
    queries, chunks, visible = on(device, drawn(torch.float32, 1, 40, 12, 8))
    broken_queries, broken_chunks = queries.clone(), chunks.clone()
    broken_queries[:, 5] = torch.nan
    broken_chunks[:, 3] = torch.nan
    broken = [x.requires_grad_() for x in (broken_queries, broken_chunks)]
    indices, scores = chunk_search(*broken, visible, 4)
    assert (indices[:, 5] == -1).all() and (indices != 3).all()
    assert_found((indices, scores.detach()), [broken_queries.detach(), broken_chunks.detach(), visible], 4)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(scores.sum(), broken))


def test_only_the_gradients_that_are_asked_for(device):
    queries, chunks, visible = on(device, drawn(torch.float32, 1, 9, 7, 8))
    both = [queries.clone().requires_grad_(), chunks.clone().requires_grad_()]
    expected = torch.autograd.grad(chunk_search(*both, visible, 2)[1].sum(), both)
    for i in range(2):
        inputs = [queries, chunks]
        inputs[i] = inputs[i].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(chunk_search(*inputs, visible, 2)[1].sum(), inputs[i])
        assert torch.equal(gradient, expected[i])
    indices, scores = chunk_search(queries, chunks, visible, 2)
    assert not indices.requires_grad and not scores.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k must lie in 1 to 16, got 0"),
        ({"top_k": 17}, "top_k must lie in 1 to 16, got 17"),
        ({"queries": torch.zeros(2, 5, 9)}, r"must agree in B and E, got \(2, 5, 9\) and \(2, 3, 8\)"),
        ({"queries": torch.zeros(5, 8)}, r"must agree in B and E, got \(5, 8\)"),
        ({"chunks": torch.zeros(1, 3, 8)}, r"must agree in B and E, got \(2, 5, 8\) and \(1, 3, 8\)"),
        ({"chunks": torch.zeros(2, 3, 8).bfloat16()}, "got torch.float32 and torch.bfloat16"),
        ({"queries": torch.zeros(2, 5, 8).double(), "chunks": torch.zeros(2, 3, 8).double()}, "got torch.float64"),
        ({"visible": torch.zeros(2, 5, dtype=torch.int32)}, "must be int64 .* got torch.int32"),
        ({"visible": torch.zeros(2, 4, dtype=torch.int64)}, r"\(2, 5\) or \(1, 5\), got .* of shape \(2, 4\)"),
    ],
)
def test_refuses_what_does_not_fit(device, change, message):
    arguments = {"queries": torch.zeros(2, 5, 8), "chunks": torch.zeros(2, 3, 8),
                 "visible": torch.zeros(2, 5, dtype=torch.int64), "top_k": 2, **change}
    with pytest.raises(ValueError, match=message):
        chunk_search(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in arguments.items()})
