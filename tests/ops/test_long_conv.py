"""long_conv with a filter shorter than the sequence, with few outputs wanted, and its causality to the last bit."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.ops.conv import long_conv


def conv_by_definition(x, kernel):
    """y[t] = sum over s of kernel[s] * x[t - s], for a filter of any length."""
    rows = []
    for t in range(x.shape[1]):
        seen = min(t + 1, kernel.shape[0])
        rows.append((kernel[:seen].flip(0) * x[:, t + 1 - seen : t + 1]).sum(1))
    return torch.stack(rows, 1)


@settings(deadline=None, max_examples=100)
@given(
    T=st.integers(1, 60), taps=st.integers(1, 70), block_size=st.integers(1, 70), wanted=st.floats(0, 1),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_outputs_and_gradients(T, taps, block_size, wanted, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, T, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(taps, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    outputs = 1 + int(wanted * (T - 1))
    expected = conv_by_definition(x, kernel)[:, T - outputs :]
    y = long_conv(x, kernel, outputs=outputs, block_size=block_size)
    assert_close(y, expected, 1e-12)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad(z, (x, kernel), weights) for z in (y, expected)), strict=True)
    for actual, wanted_gradient in pairs:
        assert_close(actual, wanted_gradient, 1e-12)


@settings(deadline=None, max_examples=50)
@given(T=st.integers(2, 300), taps=st.integers(1, 300), t=st.floats(0, 1), seed=st.integers(0, 100))
def test_later_inputs_change_no_bit_of_an_output(T, taps, t, seed):
    generator = torch.Generator().manual_seed(seed)
    x, kernel = torch.randn(1, T, 2, generator=generator), torch.randn(taps, 2, generator=generator)
    t = int(t * (T - 1))
    other = torch.cat((x[:, : t + 1], 1e6 * torch.randn(1, T - t - 1, 2, generator=generator)), 1)
    assert torch.equal(long_conv(x, kernel)[:, : t + 1], long_conv(other, kernel)[:, : t + 1])


@pytest.mark.parametrize("T", [256, 300, 1100])
def test_gradients_stop_at_the_output_exactly(T):
    x = torch.randn(1, T, 2, requires_grad=True)
    for t in (0, 127, 128, T // 2, T - 2):
        (gradient,) = torch.autograd.grad(long_conv(x, torch.randn(T, 2))[0, t].sum(), x)
        assert gradient[0, t + 1 :].eq(0).all() and gradient[0, : t + 1].ne(0).all()


@pytest.mark.parametrize("taps", [64, 2048])
def test_fp32_over_a_long_sequence(taps):
    x, kernel = torch.randn(1, 2048, 2), torch.randn(taps, 2)
    doubled = F.conv1d(
        F.pad(x.double().mT, (taps - 1, 0)), kernel.double().flip(0).T.unsqueeze(1), groups=2
    )
    assert_close(long_conv(x, kernel), doubled.mT, 1e-6)


@pytest.mark.parametrize("outputs", [None, 1])
def test_bfloat16_is_computed_in_fp32(outputs):
    x, kernel = torch.randn(2, 50, 3).bfloat16(), torch.randn(50, 3).bfloat16()
    y = long_conv(x, kernel, outputs=outputs)
    assert y.dtype == torch.bfloat16
    expected = long_conv(x.float(), kernel.float(), outputs=outputs)
    torch.testing.assert_close(y, expected.bfloat16(), rtol=0.01, atol=1e-3)
