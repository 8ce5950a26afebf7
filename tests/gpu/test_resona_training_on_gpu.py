"""A Resona layer in training on a GPU: its kernels at full size, what it launches, and that the host never waits."""

import pytest
import torch
from closeness import assert_close
from resona_kernel_checks import EPS, Draw, assert_agrees, norms_torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lrm_kernels.gate_weights import gate_weights
from lrm_kernels.mix_retrieved import mix_retrieved
from lrm_kernels.pool_chunks import pool_chunks
from lrm_kernels.rms_norm import memory_norm
from lrm_kernels.unit_rows import unit_rows
from lrm_recall.context import Context
from lrm_recall.ops.dispatch import BACKEND_VARIABLE
from lrm_recall.resona import search
from lrm_recall.resona.gate import gate_weights_torch, mix_retrieved_torch
from lrm_recall.resona.layer import Resona
from lrm_recall.resona.memory import DenseMemory

T, D, E, K, U = 8192, 1024, 128, 4, 64  # GLA-340M at 8K tokens
MOST_LAUNCHES = 90  # of one layer, forward and backward; 172 when each op was torch's own
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def case(op: str, dtype: torch.dtype) -> tuple:
    draw = Draw(dtype)
    if op == "unit rows":
        return unit_rows, search.unit_rows_torch, [draw.leaf(1, T, E)]
    if op == "gate":
        scores = Draw().leaf(1, T, K)  # float32, as the search gives them
        inputs = [draw.leaf(1, T, E), scores, draw.indices(1, T, K, N=9), draw.leaf(E), draw.leaf()]
        return gate_weights, gate_weights_torch, inputs
    if op == "pool":
        return pool_chunks, search.pool_chunks_torch, [draw.leaf(1, T // U, U, D), draw.leaf(U, D)]
    if op == "norm":
        return memory_norm, norms_torch, [draw.leaf(1, T, D), draw.leaf(D), EPS]
    alpha = draw.leaf(1, T, 1) if op == "learned mix" else 0.5
    inputs = [draw.leaf(1, T, D), draw.leaf(1, T, D), draw.indices(1, T, K), alpha]
    return mix_retrieved, mix_retrieved_torch, inputs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("op", ["unit rows", "gate", "pool", "norm", "mix", "learned mix"])
def test_full_size(op, dtype):
    # a gradient that is a sum over T positions: the rounding of its terms, each of about one, is what remains
    assert_agrees(*case(op, dtype), TOLERANCE[dtype], least_scale=T**0.5)


def test_more_than_2_31_elements():
    rows, wide, last = (1 << 23) + 5, 256, 100
    x = torch.ones(1, rows, wide, device="cuda", dtype=torch.bfloat16)
    x[:, -last:] = torch.randn(1, last, wide, device="cuda")
    x.requires_grad_()
    indices = torch.zeros(1, rows, 1, device="cuda", dtype=torch.int64)
    for function in (unit_rows, lambda y: mix_retrieved(y, y, indices[:, : y.shape[1]], 0.25)):
        tail = x[:, -last:].detach().clone().requires_grad_()
        expected = function(tail)
        (d_tail,) = torch.autograd.grad(expected, tail, tail.detach())
        actual = function(x)
        (d_x,) = torch.autograd.grad(actual, x, x.detach())
        assert torch.equal(actual[:, -last:], expected) and torch.equal(d_x[:, -last:], d_tail)


def make(dtype=torch.bfloat16, **options):
    """A layer, and x and a memory for it."""
    torch.manual_seed(0)
    options = dict(chunk_size=U, top_k=K, encoder="linear", encoder_dim=E, num_heads=16) | options
    layer = Resona(nn.Identity(), D, **options).to("cuda", dtype)
    x, memory = (torch.randn(1, T, D, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    return layer, x, memory


def step(layer, x, memory):
    """The output, and the gradients of x, the memory and every parameter."""
    y = layer(x, Context(memory=DenseMemory(memory)))
    leaves = [x, memory, *layer.parameters()]
    d_y = x.detach()
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": "learned"}, {"encoder": "place", "encoder_dim": None, "top_k": 1}, {"gate": "none"},
     {"memory_norm": False}],
    ids=str,
)  # fmt: skip
def test_a_layer_in_kernels_is_the_layer_in_torch(options, monkeypatch):
    layer, x, memory = make(torch.float32, **options)
    found = layer.retrieve(x, Context(memory=DenseMemory(memory))).indices  # near ties would fall either way
    results = []
    for backend in ("library", "torch"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        y = layer(x, Context(memory=DenseMemory(memory), chunk_indices=found))
        leaves = [x, memory, *layer.parameters()]
        gradients = torch.autograd.grad(y, leaves, x.detach(), allow_unused=True, materialize_grads=True)
        results.append([y.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-4, least_scale=1e-2)


def test_few_launches(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "library")
    given = make()
    for _ in range(3):
        step(*given)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        step(*given)
        torch.cuda.synchronize()
    launches = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 30 < len(launches) <= MOST_LAUNCHES, sorted(launches)


def test_the_host_never_waits_and_a_graph_replays_the_step():
    given = make()
    expected = step(*given)  # compiled here
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*given)
    graph.replay()
    torch.cuda.synchronize()
    for x, y, z in zip(expected, eager, captured, strict=True):
        assert torch.equal(x, y)
        assert_close(z.float(), x.float(), 5e-3, least_scale=1e-2)  # in a graph cuBLAS may take another kernel
