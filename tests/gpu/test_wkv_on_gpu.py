"""RWKV4's recurrence at the size of MQAR's training, in memory full of garbage, captured, and beyond 2^31 elements."""

import pytest
import torch
from closeness import assert_close, forward_and_gradients

from lrm_kernels.wkv import wkv
from lrm_recall.ops.rwkv4 import rwkv4_recurrent, rwkv4_step

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}
RESULTS = ("output", "final state", "d w", "d u", "d k", "d v", "d state")


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def drawn(B, T, D, dtype, seed=0):
    """w from slow to fast as in the mixer, u, k, v and a state."""
    draw = torch.Generator("cuda").manual_seed(seed)
    u, k, v, sums = (torch.randn(shape, generator=draw, device="cuda") for shape in ((D,), (B, T, D), (B, T, D),
                                                                                     (B, 3, D)))
    weight = sums[:, 1].abs() + 0.5
    state = torch.stack((sums[:, 0] * weight, weight, sums[:, 2]), dim=1)  # [B, 3, D]
    return [torch.linspace(-5, 3, D, device="cuda"), u, (2 * k).to(dtype), v.to(dtype), state]


def kernel(*inputs):
    return [x.cpu() for x in wkv(*inputs)]


def loop(w, u, k, v, state=None):
    return [x.cpu() for x in rwkv4_recurrent(w, u, k, v, initial_state=state)]


def assert_agrees(inputs, tolerance, least_scale=0.0):
    results, gradients = forward_and_gradients(kernel, inputs)
    expected = forward_and_gradients(loop, [x.double() for x in inputs])
    for name, x, y in zip(RESULTS, results + gradients, expected[0] + expected[1], strict=False):
        assert_close(x.cpu(), y.cpu(), tolerance, name, least_scale)


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_full_size(dtype, given):
    assert_agrees(drawn(128, 512, 128, dtype)[: 5 if given else 4], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("B", "T", "D"), [(1, 19, 1), (3, 37, 200), (2, 8, 33), (5, 129, 31)])
def test_odd_shapes(B, T, D, dtype):
    assert_agrees(drawn(B, T, D, dtype), TOLERANCE[dtype], 1.0)  # of one channel, terms of about one may cancel


def test_the_same_in_every_run():
    inputs = drawn(128, 512, 128, torch.bfloat16)
    first, second = (forward_and_gradients(kernel, inputs) for _ in range(2))
    for x, y in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_one_token(dtype):
    w, u, k, v, state = drawn(4, 1, 128, dtype)
    output, final = wkv(w, u, k, v, state)
    expected, expected_final = rwkv4_step(w, u, k[:, 0], v[:, 0], state)
    assert_close(output[:, 0], expected, TOLERANCE[dtype])
    assert_close(final, expected_final, 1e-6)


def test_both_passes_in_a_cuda_graph():
    static = [x.requires_grad_() for x in drawn(8, 40, 64, torch.float32)]
    others = drawn(8, 40, 64, torch.float32, seed=1)

    def step():
        output, final = wkv(*static)
        return [output, final, *torch.autograd.grad((output, final), static, (output.detach(), final.detach()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, y in zip(static, others, strict=True):
            x.copy_(y)
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert torch.equal(x, y)


def test_more_than_2_31_elements():
    B, T, D = 129, 1 << 13, 1 << 11
    torch.use_deterministic_algorithms(False)  # the fills take as long as the test
    k, v, grad = (torch.randn(B, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    w, u = torch.linspace(-5, 3, D, device="cuda"), torch.zeros(D, device="cuda")

    def run(k, v, grad):
        k, v = (x.detach().requires_grad_() for x in (k, v))
        output, final = wkv(w, u, k, v)
        return [output.detach(), final.detach(), *torch.autograd.grad(output, (k, v), grad)]

    for x, y in zip(run(k, v, grad), run(k[-1:], v[-1:], grad[-1:]), strict=True):
        assert torch.equal(x[-1:], y)
