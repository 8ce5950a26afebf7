"""Short and long causal convolutions against sums over taps, and the scan between chunks against a loop."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.ops.conv import long_conv, short_conv
from lrm_recall.ops.scan import chunk_scan


def conv_by_definition(x, kernel):
    """y[t] = sum over s of kernel[s] * x[t - s]."""
    return torch.stack([(kernel[: t + 1].flip(0) * x[:, : t + 1]).sum(1) for t in range(x.shape[1])], 1)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_short_conv_is_conv1d(T, taps):
    x, weight, bias = torch.randn(2, T, 5), torch.randn(5, taps), torch.randn(5)
    expected = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=taps - 1, groups=5)[..., :T].mT
    y, state = short_conv(x, weight, bias)
    assert_close(y, expected)
    assert torch.equal(state, F.pad(x, (0, 0, taps - 1, 0))[:, T:])
    assert_close(short_conv(x, weight)[0], expected - bias)


def test_short_conv_continues_from_its_state():
    x, weight = torch.randn(2, 10, 5), torch.randn(5, 4)
    state, parts = None, []
    for piece in x.split((1, 2, 6, 1), dim=1):
        y, state = short_conv(piece, weight, state=state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), short_conv(x, weight)[0])


def test_short_conv_gradients():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 3), (3, 4), (3,), (2, 3, 3))]
    assert torch.autograd.gradcheck(short_conv, inputs)
    x, weight, _, _ = inputs
    assert torch.autograd.gradcheck(lambda x, w: short_conv(x, w)[0], (x, weight))


@settings(deadline=None, max_examples=100)
@given(T=st.integers(1, 40), block_size=st.integers(1, 48), seed=st.integers(0, 100))
def test_long_conv_is_the_sum_over_lags(T, block_size, seed):
    generator = torch.Generator().manual_seed(seed)
    x, kernel = torch.randn(2, T, 3, generator=generator), torch.randn(T + seed % 3, 3, generator=generator)
    assert_close(long_conv(x, kernel, block_size=block_size), conv_by_definition(x, kernel))


def test_long_conv_gradients_and_causality():
    x = torch.randn(1, 11, 2, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, k: long_conv(x, k, block_size=2), (x, kernel))
    y = long_conv(x, kernel, block_size=2)
    for t in range(11):
        (gradient,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert gradient[:, t + 1 :].eq(0).all() and gradient[:, : t + 1].ne(0).all()


def test_long_conv_at_its_default_block_size():
    x, kernel = torch.randn(1, 300, 2), torch.randn(300, 2)
    assert_close(long_conv(x, kernel), conv_by_definition(x, kernel))
    assert long_conv(x.bfloat16(), kernel).dtype == torch.bfloat16


@pytest.mark.parametrize("N", [0, 1, 5])
def test_chunk_scan_is_its_loop(N):
    decay, state = torch.rand(N, 2, 3, 1), torch.randn(2, 3, 4)
    writes, values = torch.randn(N, 2, 6, 3), torch.randn(2, N, 6, 4).transpose(0, 1)
    states = chunk_scan(decay, writes, values, state)
    assert states.shape == (N + 1, 2, 3, 4)
    assert torch.equal(states[0], state)
    for n in range(N):
        state = decay[n] * state + writes[n].mT @ values[n]
        assert_close(states[n + 1], state)


def test_chunk_scan_gradients():
    shapes = ((3, 2, 1, 4), (3, 2, 5, 2), (3, 2, 5, 4), (2, 2, 4))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(chunk_scan, inputs)
