"""The kernels around Resona's search and attention, against their torch forms: results and every gradient."""

import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from resona_kernel_checks import DEVICE, EPS, TOLERANCE, Draw, assert_agrees, norms_torch, with_gradients
from torch import nn

from lrm_kernels.column_sums import column_sums
from lrm_kernels.gate_weights import gate_weights
from lrm_kernels.mix_retrieved import mix_retrieved
from lrm_kernels.pool_chunks import pool_chunks
from lrm_kernels.rms_norm import memory_norm
from lrm_kernels.unit_rows import unit_rows
from lrm_recall.ops.dispatch import Unsupported
from lrm_recall.ops.libraries import own
from lrm_recall.resona import integrate, search
from lrm_recall.resona import layer as resona_layer
from lrm_recall.resona.gate import gate_weights_torch, mix_retrieved_torch
from lrm_recall.resona.layer import Resona


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 128), (3, 5, 33), (1, 70, 200)])
def test_unit_rows(shape, dtype):
    assert_agrees(unit_rows, search.unit_rows_torch, [Draw(dtype).leaf(*shape)], TOLERANCE[dtype], least_scale=1.0)


def test_a_row_of_zeros_stays_zero():
    x = Draw().leaf(1, 3, 8)
    with torch.no_grad():
        x[0, 1] = 0.0
    results, _ = assert_agrees(unit_rows, search.unit_rows_torch, [x])
    assert (results[0][0, 1] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("B", "T", "E", "k"), [(1, 1, 8, 1), (2, 37, 33, 4), (1, 70, 128, 16), (3, 5, 300, 2)])
def test_gate_weights(B, T, E, k, dtype):
    draw = Draw(dtype)
    queries, null = draw.leaf(B, T, E), draw.leaf(E)
    with torch.no_grad():
        queries /= E**0.5
    scores = draw.leaf(B, T, k).detach().float().requires_grad_()  # as the search gives them
    indices = draw.indices(B, T, k, N=9)
    indices[:, T // 2] = -1  # a position without any chunk
    log_temperature = torch.tensor(0.7, device=DEVICE, dtype=dtype).requires_grad_()
    inputs = [queries, scores, indices, null, log_temperature]
    (weights,), _ = assert_agrees(gate_weights, gate_weights_torch, inputs, TOLERANCE[dtype], least_scale=0.1)
    assert weights.dtype == dtype and (weights[indices == -1] == 0).all()


def test_scores_of_no_chunk_are_not_read():
    draw = Draw()
    indices = draw.indices(2, 9, 3)
    scores = draw.leaf(2, 9, 3).detach().masked_fill(indices == -1, torch.nan).requires_grad_()
    (weights,), (_, d_scores, *_) = with_gradients(
        gate_weights, [draw.leaf(2, 9, 5), scores, indices, draw.leaf(5), draw.leaf()]
    )
    assert weights.isfinite().all() and d_scores.isfinite().all() and (d_scores[indices == -1] == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(0, 99))
def test_any_gate(B, T, E, k, seed):
    draw = Draw(seed=seed)
    queries, scores, null, tau = draw.leaf(B, T, E), draw.leaf(B, T, k), draw.leaf(E), draw.leaf()
    inputs = [queries, scores, draw.indices(B, T, k), null, tau]
    terms = (B * T) ** 0.5 * tau.exp().item()  # about how large those of the null chunk's gradient are; they cancel
    (weights,), _ = assert_agrees(gate_weights, gate_weights_torch, inputs, least_scale=max(1.0, terms))
    assert (weights >= 0).all() and (weights.sum(-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1, "learned"])
@pytest.mark.parametrize(("B", "T", "D", "k"), [(1, 1, 5, 1), (2, 37, 33, 16), (1, 9, 200, 3)])
def test_mix_retrieved(B, T, D, k, alpha, dtype):
    draw = Draw(dtype)
    mixed, retrieved, indices = draw.leaf(B, T, D), draw.leaf(B, T, D), draw.indices(B, T, k)
    alpha = draw.leaf(B, T, 1) if alpha == "learned" else alpha
    assert_agrees(mix_retrieved, mix_retrieved_torch, [mixed, retrieved, indices, alpha], TOLERANCE[dtype])


@pytest.mark.parametrize("alpha", [0.3, "learned"])
def test_where_nothing_was_found_the_mixer_stands_alone(alpha):
    draw = Draw()
    mixed, retrieved = draw.leaf(1, 4, 6), draw.leaf(1, 4, 6)
    indices = torch.tensor([[[-1, -1], [-1, 2], [0, -1], [1, 2]]], device=DEVICE)  # found beforehand: in any order
    alpha = draw.leaf(1, 4, 1) if alpha == "learned" else alpha
    with torch.no_grad():
        retrieved[:, 0] = torch.nan
    (y,), (d_mixed, d_retrieved, *d_alpha) = with_gradients(mix_retrieved, [mixed, retrieved, indices, alpha])
    assert torch.equal(y[:, 0], mixed[:, 0]) and (y[:, 1:] != mixed[:, 1:]).all()
    assert (d_retrieved[:, 0] == 0).all() and (d_retrieved[:, 1:] != 0).all() and d_mixed.isfinite().all()
    for gradient in d_alpha:
        assert gradient[0, 0] == 0 and (gradient[0, 1:] != 0).all()


def test_mixing_keeps_the_wider_dtype():
    draw = Draw()
    mixed, retrieved = draw.leaf(1, 4, 6), Draw(torch.bfloat16).leaf(1, 4, 6)
    (y,), (d_mixed, d_retrieved) = with_gradients(mix_retrieved, [mixed, retrieved, draw.indices(1, 4, 2), 0.5])
    assert (y.dtype, d_mixed.dtype, d_retrieved.dtype) == (torch.float32, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("B", "N", "U", "D"), [(1, 1, 1, 40), (2, 5, 3, 20), (1, 19, 70, 130), (3, 60, 2, 9)])
def test_pool_chunks(B, N, U, D, dtype):
    draw = Draw(dtype)
    assert_agrees(pool_chunks, search.pool_chunks_torch, [draw.leaf(B, N, U, D), draw.leaf(U, D)], TOLERANCE[dtype])


def test_no_chunks_pool_to_none():
    draw = Draw()
    (pooled,), (d_tokens, d_place) = with_gradients(pool_chunks, [draw.leaf(2, 0, 3, 5), draw.leaf(3, 5)])
    assert pooled.shape == (2, 0, 5) and d_tokens.numel() == 0 and (d_place == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 7, 33), (1, 300, 200)])
def test_memory_norm(shape, dtype):
    draw = Draw(dtype)
    assert_agrees(memory_norm, norms_torch, [draw.leaf(*shape), draw.leaf(shape[-1]), EPS], TOLERANCE[dtype])


@pytest.mark.parametrize("readers", [(0,), (1,), (0, 2), (1, 2)])
def test_a_memory_that_some_read(readers):
    draw = Draw()
    inputs = [draw.leaf(2, 9, 33), draw.leaf(33), EPS]
    assert_agrees(*((lambda *x, f=f: tuple(f(*x)[i] for i in readers)) for f in (memory_norm, norms_torch)), inputs)


def test_a_memory_that_nobody_learns_through():
    x, weight = Draw().leaf(1, 4, 8), Draw().leaf(8)
    y = memory_norm(x, weight, EPS)[0]
    assert torch.autograd.grad(y.detach().sum() + x.sum(), [x, weight], allow_unused=True)[1] is None


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 200))
def test_column_sums(P, D):
    parts = torch.randn(P, D, generator=torch.Generator().manual_seed(P)).to(DEVICE)
    assert_close(column_sums(parts, torch.float32), parts.sum(0), 1e-5)


def test_the_same_in_every_run():
    draw = Draw(torch.bfloat16)
    gate = [draw.leaf(2, 50, 33), draw.leaf(2, 50, 4), draw.indices(2, 50, 4), draw.leaf(33), draw.leaf()]
    pool, norm = [draw.leaf(1, 40, 3, 20), draw.leaf(3, 20)], [draw.leaf(1, 300, 20), draw.leaf(20), EPS]
    for kernel, inputs in ((gate_weights, gate), (pool_chunks, pool), (memory_norm, norm)):
        first, second = (sum(with_gradients(kernel, inputs), []) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.fixture
def through_kernels(monkeypatch):
    """Resona layers compute with our kernels wherever the tensors are."""

    def on(use: bool) -> None:
        names = {search: ("unit_rows", "pool_chunks", "chunk_search"), integrate: ("chunk_attention",)}
        layers = ("gate_weights", "mix_retrieved", "chunk_search", "chunk_attention")
        for module, ops in {**names, resona_layer: layers}.items():
            for op in ops:
                form = getattr(own, op) if use else _torch_form(op)
                monkeypatch.setattr(module, op, form)
        monkeypatch.setattr(resona_layer, "fusion", lambda name, x: getattr(own, name) if use else None)

    return on


def _torch_form(op):
    forms = {"gate_weights": gate_weights_torch, "mix_retrieved": mix_retrieved_torch}
    return forms.get(op) or getattr(search, f"{op}_torch", None) or getattr(integrate, f"{op}_torch")


@pytest.mark.parametrize(
    ("encoder", "gate", "alpha", "top_k"),
    [("linear", "null_chunk", 0.5, 4), ("place", "null_chunk", "learned", 1), ("mean", "none", 0.3, 2)],
)
@pytest.mark.parametrize("length", [1, 16, 45])
def test_a_layer_in_kernels_is_the_layer_in_torch(encoder, gate, alpha, top_k, length, through_kernels):
    torch.manual_seed(0)
    dim = 16 if encoder == "linear" else None
    layer = Resona(nn.Linear(32, 32), 32, chunk_size=8, top_k=top_k, encoder=encoder, encoder_dim=dim, gate=gate,
                   alpha=alpha, num_heads=2).to(DEVICE)  # fmt: skip
    leaves = [torch.randn(2, length, 32, device=DEVICE, requires_grad=True) for _ in range(2)]
    leaves += layer.parameters()
    d_y = torch.randn(2, length, 32, device=DEVICE)
    results = []
    for use in (True, False):
        through_kernels(use)
        y = layer(leaves[0], memory=leaves[1])
        results.append([y.detach(), *torch.autograd.grad(y, leaves, d_y, allow_unused=True, materialize_grads=True)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-5, least_scale=1e-2)


def test_autocast_gives_the_dtypes_that_torch_gives():
    draw = Draw()
    x, tokens, place = draw.leaf(1, 3, 8).bfloat16(), draw.leaf(1, 2, 3, 8), draw.leaf(3, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert own.unit_rows(x).dtype == torch.float32
        if DEVICE == "cuda":  # on a CPU torch leaves a norm in bfloat16
            assert search.unit_rows_torch(x).dtype == torch.float32
        assert own.pool_chunks(tokens, place).dtype == search.pool_chunks_torch(tokens, place).dtype == torch.bfloat16
    assert own.unit_rows(x).dtype == torch.bfloat16 and own.pool_chunks(tokens, place).dtype == torch.float32


def test_adapters_leave_to_torch_what_kernels_do_not_take():
    x, indices = torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, 17, dtype=torch.int64)
    narrow = x.float()
    for call in (
        lambda: own.unit_rows(x),
        lambda: own.pool_chunks(x[:, None], x[0]),
        lambda: own.memory_norm(x, x[0, 0], EPS),
        lambda: own.gate_weights(x, x, indices, x[0, 0], x[0, 0, 0]),
        lambda: own.mix_retrieved(x, x, indices, 0.5),
        lambda: own.mix_retrieved(narrow, narrow, indices[..., :2], x[..., :1]),
        lambda: own.mix_retrieved(narrow, narrow, indices, 0.5),
        lambda: own.unit_rows(narrow.new_zeros(1, 1, 20_000)),
    ):
        with pytest.raises(Unsupported):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i: unit_rows(x.new_zeros(1, 1, 20_000)), "at most 16384 channels, got 20000"),
        (lambda x, i: memory_norm(x[:0], x[0, 0], EPS), r"got shape \(0, 2, 4\)"),
        (lambda x, i: pool_chunks(x[None], x[0, :1]), r"got \(1, 4\)"),
        (lambda x, i: gate_weights(x, x, i, x[0, 0], x[0, 0, 0]), r"\(1, 2, 4\), \(1, 2, 3\)"),
        (lambda x, i: gate_weights(x, x[..., :3], i, x[0, 0], x[0, 0]), r"log_temperature \(4,\)"),
        (lambda x, i: mix_retrieved(x, x[..., :3], i, 0.5), r"got \(1, 2, 4\), \(1, 2, 3\)"),
        (lambda x, i: mix_retrieved(x, x, i, x), r"alpha must have the shape \[1, 2, 1\], got \[1, 2, 4\]"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2, 4, device=DEVICE), torch.zeros(1, 2, 3, dtype=torch.int64, device=DEVICE))
