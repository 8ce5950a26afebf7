"""The search for the best chunks at full size, in memory full of garbage, and beyond 2^31 elements."""

import random

import pytest
import torch
from chunk_search_checks import TOLERANCE, assert_forward_and_gradients, assert_found, drawn

from lrm_kernels.chunk_search import chunk_search

KINDS = [  # each is compiled once, for several lengths
    (torch.bfloat16, 128, 4), (torch.bfloat16, 64, 1), (torch.bfloat16, 48, 16), (torch.bfloat16, 33, 2),
    (torch.bfloat16, 320, 3), (torch.float16, 128, 8), (torch.float16, 16, 5), (torch.float32, 128, 4),
    (torch.float32, 16, 16), (torch.float32, 33, 1),
]  # fmt: skip
SHAPES = 26  # of each kind


def poison(size: int = 1 << 26) -> None:
    """Leave NaN in the memory that the next tensors, of whatever size, will be given."""
    torch.cuda.empty_cache()
    blocks = [torch.full((size >> shift,), torch.nan, device="cuda") for shift in (0, 2, 4, 6, 8, 10, 12, 14, 16)]
    blocks += [torch.full((128,), torch.nan, device="cuda") for _ in range(64)]  # the allocator's small blocks
    del blocks


@pytest.mark.parametrize(("dtype", "E", "top_k"), KINDS, ids=str)
def test_random_shapes_in_poisoned_memory(dtype, E, top_k):
    draw = random.Random(f"{dtype} {E} {top_k}")
    for seed in range(SHAPES):
        B, T = draw.choice([1, 1, 2, 5]), draw.choice([1, 63, 64, 65, draw.randint(2, 700), draw.randint(2, 5000)])
        N = draw.choice([0, 1, 64, 65, draw.randint(2, 300), draw.randint(2, 1500)])
        inputs = drawn(dtype, B, T, N, E, seed, "cuda")
        if draw.random() < 0.5:  # the causal rule in place of random counts
            inputs[2] = (torch.arange(T, device="cuda") * (N + 1) // T).expand(B, T)
        poison(1 << 22)
        assert_forward_and_gradients(inputs, top_k, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "E", "top_k"), [
    (torch.bfloat16, 128, 4), (torch.bfloat16, 128, 16), (torch.bfloat16, 2048, 4), (torch.float32, 128, 4),
], ids=str)  # fmt: skip
def test_full_size(dtype, E, top_k):
    T, N = 65536, 1024
    queries, chunks, _ = drawn(dtype, 1, T, N, E, device="cuda")
    visible = torch.arange(T, device="cuda")[None] // (T // N)
    found = chunk_search(queries, chunks, visible, top_k)
    for rows in torch.arange(T, device="cuda").split(T // 8):  # the reference holds all scores of its rows
        assert_found(tuple(x[:, rows] for x in found), [queries[:, rows], chunks, visible[:, rows]], top_k)
    if E == 128:
        assert_forward_and_gradients([queries, chunks, visible], top_k, TOLERANCE[dtype])


def test_the_scores_are_never_in_memory():
    T, N, top_k = 65536, 1024, 4
    queries, chunks, _ = drawn(torch.bfloat16, 1, T, N, 128, device="cuda")
    visible = torch.arange(T, device="cuda")[None] // (T // N)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    indices, scores = chunk_search(queries, chunks, visible, top_k)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= indices.nbytes + scores.nbytes + 2**20  # the scores would be 128 MB in bf16


def test_gradients_are_the_same_every_time():
    queries, chunks, visible = drawn(torch.bfloat16, 2, 5000, 70, 128, device="cuda")
    inputs = [queries.requires_grad_(), chunks.requires_grad_()]
    runs = [torch.autograd.grad(chunk_search(*inputs, visible, 4)[1].square().sum(), inputs) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def test_more_than_2_31_elements_of_queries():
    E, N, top_k, far = 128, 9, 3, 1000
    T = (1 << 24) + far
    chunks = drawn(torch.bfloat16, 1, 1, N, E, device="cuda")[1].requires_grad_()
    queries = torch.randn(1, T, E, device="cuda", dtype=torch.bfloat16).requires_grad_()
    visible = torch.arange(T, device="cuda")[None] % (N + 1)
    indices, scores = chunk_search(queries, chunks, visible, top_k)
    last = [queries[:, -far:].detach(), chunks.detach(), visible[:, -far:]]
    assert_found((indices[:, -far:], scores[:, -far:].detach()), last, top_k)
    weights = torch.zeros_like(scores)
    weights[:, -far:] = 1.0  # so that the far rows alone decide
    d_queries, d_chunks = torch.autograd.grad(scores, (queries, chunks), weights)
    inputs = [x.requires_grad_() for x in last[:2]]
    expected = torch.autograd.grad(chunk_search(*inputs, last[2], top_k)[1].sum(), inputs)
    assert torch.equal(d_queries[:, -far:], expected[0]) and not d_queries[:, :far].any()
    torch.testing.assert_close(d_chunks, expected[1], rtol=1e-2, atol=1e-2)


def test_more_than_2_31_elements_of_chunks():
    E, T, top_k = 128, 3, 2
    N = (1 << 24) + 70
    chunks = torch.zeros(1, N, E, device="cuda", dtype=torch.bfloat16)
    chunks[:, -3] = 1.0
    chunks[:, 5] = 0.5
    queries = torch.ones(1, T, E, device="cuda", dtype=torch.bfloat16)
    inputs = [queries.requires_grad_(), chunks.requires_grad_()]
    indices, scores = chunk_search(*inputs, torch.tensor([[0, N - 3, N]], device="cuda"), top_k)
    assert indices[0].tolist() == [[-1, -1], [5, 0], [N - 3, 5]]
    assert scores[0].tolist() == [[0.0, 0.0], [64.0, 0.0], [128.0, 64.0]]
    d_queries, d_chunks = torch.autograd.grad(scores.sum(), inputs)
    assert d_queries[0, :, 0].tolist() == [0.0, 0.5, 1.5]
    touched = d_chunks[0].any(dim=-1).nonzero().flatten().tolist()
    assert touched == [0, 5, N - 3] and d_chunks[0, touched, 0].tolist() == [1.0, 2.0, 1.0]
