"""The long convolution's kernels against the sum over lags in fp64: outputs, gradients, exact causality, layouts."""

import pytest
import torch
from closeness import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrm_kernels import long_conv as module
from lrm_kernels.long_conv import long_conv


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def by_definition(x, kernel):
    """Every lag in its turn."""
    y = torch.zeros_like(x)
    for lag in range(kernel.shape[0]):
        y[:, lag:] = y[:, lag:] + kernel[lag] * x[:, : x.shape[1] - lag]
    return y


def drawn(B, T, L, D, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(B + T + L + D)
    shapes = (B, T, D), (L, D), (B, T, D)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def as_rows(x):
    """x [B, T, D] in the memory of a contiguous [D, B, T]."""
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def results(function, x, kernel, weights):
    x, kernel = x.detach().requires_grad_(), kernel.detach().requires_grad_()
    y = function(x, kernel)
    return [y.detach(), *torch.autograd.grad(y, (x, kernel), weights)]


def assert_is_the_definition(x, kernel, weights, tolerance=1e-5):
    actual = results(long_conv, x, kernel, weights)
    expected = results(by_definition, x.double(), kernel.double(), weights.double())
    for name, found, wanted in zip(("y", "grad x", "grad kernel"), actual, expected, strict=True):
        assert found.dtype == x.dtype
        assert_close(found.double(), wanted, tolerance, name)


@pytest.mark.parametrize(
    ("B", "T", "L", "D"),
    [
        (1, 1, 1, 3),  # one token
        (1, 7, 7, 3),  # less than a tile
        (3, 64, 64, 1),  # one tile
        (2, 131, 131, 3),
        (2, 131, 1, 2),  # one tap
        (1, 200, 64, 2),  # taps end with a tile
        (2, 200, 65, 1),
        (1, 130, 129, 2),
        (130, 17, 9, 1),  # more rows than a tile
    ],
)
def test_forward_and_gradients(device, B, T, L, D):
    assert_is_the_definition(*drawn(B, T, L, D, device))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(B=st.integers(1, 20), T=st.integers(1, 140), taps=st.floats(0, 1), D=st.integers(1, 3))
def test_any_shape(device, B, T, taps, D):
    assert_is_the_definition(*drawn(B, T, 1 + int(taps * (T - 1)), D, device))


def test_the_batch_is_shared_by_programs_or_not(device, monkeypatch):
    inputs = drawn(40, 70, 70, 2, device)
    for programs in (1, 8, 1000):  # one part; blocks of the batch that parts share unevenly; a part for each
        monkeypatch.setattr(module, "_PROGRAMS", programs)
        assert_is_the_definition(*inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(device, dtype):
    """Triton's interpreter cuts to bf16 where a GPU rounds."""
    assert_is_the_definition(*drawn(3, 80, 50, 2, device, dtype), 1e-2)


def test_a_filter_in_fp32_for_inputs_of_16_bits(device):
    x, kernel, weights = drawn(2, 40, 30, 3, device)
    y, grad_x, grad_kernel = results(long_conv, x.bfloat16(), kernel, weights.bfloat16())
    assert (y.dtype, grad_x.dtype, grad_kernel.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert_close(y.float(), by_definition(x, kernel), 1e-2)


@pytest.mark.parametrize("T", [70, 150])
def test_later_inputs_change_no_bit_of_an_output(device, T):
    x, kernel, _ = drawn(2, T, T, 2, device)
    y = long_conv(x, kernel)
    for t in (0, 63, 64, T - 2):
        other = x.clone()
        other[:, t + 1 :] = 1e6 * torch.randn(2, T - t - 1, 2, device=device)
        assert torch.equal(long_conv(other, kernel)[:, : t + 1], y[:, : t + 1])


@pytest.mark.parametrize("L", [150, 70])
def test_gradients_stop_at_the_output_and_at_the_taps_exactly(device, L):
    x, kernel, _ = drawn(1, 150, L, 2, device)
    for t in (0, 63, 64, 100, 149):
        weights = torch.zeros_like(x)
        weights[:, t] = 1
        grad_x, grad_kernel = results(long_conv, x, kernel, weights)[1:]
        seen = slice(max(0, t - L + 1), t + 1)
        assert grad_x[:, seen].ne(0).all() and grad_x.count_nonzero() == grad_x[:, seen].numel()
        assert grad_kernel[: t + 1].ne(0).all() and grad_kernel[t + 1 :].eq(0).all()


def test_rows_stay_rows(device):
    """The same bits for every layout, and the layout that came in."""
    x, kernel, weights = drawn(2, 66, 40, 3, device)
    expected = results(long_conv, x, kernel, weights)
    assert all(y.is_contiguous() for y in expected[:2])
    part = torch.cat((x, x), -1)[..., :3]
    for layout, gradient in ((as_rows(x), weights), (part, as_rows(weights)), (x.mT.contiguous().mT, weights)):
        actual = results(long_conv, layout, kernel, gradient)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    rows = results(long_conv, as_rows(x), kernel, weights)
    assert all(y.permute(2, 0, 1).is_contiguous() for y in rows[:2])


def test_more_channels_than_a_tile_of_the_transposition(device):
    assert_is_the_definition(*drawn(1, 5, 5, 66, device))


def test_gradients_of_one_argument_alone(device):
    x, kernel, weights = drawn(2, 20, 20, 3, device)
    expected = results(long_conv, x, kernel, weights)
    for index, leaf in ((1, x), (2, kernel)):
        inputs = [x, kernel]
        inputs[index - 1] = leaf.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(long_conv(*inputs), inputs[index - 1], weights)
        assert torch.equal(gradient, expected[index])
    (gradient,) = torch.autograd.grad(long_conv(x.requires_grad_(), kernel).sum(), x)  # an expanded gradient
    assert_close(gradient, results(long_conv, x, kernel, torch.ones_like(x))[1])


@pytest.mark.parametrize(
    ("x", "kernel", "message"),
    [
        ((2, 4), (4, 3), r"x must be \[B, T, D\] and kernel \[L, D\], got \[2, 4\] and \[4, 3\]"),
        ((2, 4, 3), (4, 2), r"got \[2, 4, 3\] and \[4, 2\]"),
        ((2, 4, 3), (5, 3), "1 to T taps .* got 5 taps"),
        ((2, 4, 3), (0, 3), "got 0 taps"),
        ((0, 4, 3), (4, 3), "x must not be empty"),
    ],
)
def test_refuses(device, x, kernel, message):
    with pytest.raises(ValueError, match=message):
        long_conv(torch.zeros(x, device=device), torch.zeros(kernel, device=device))


def test_refuses_fp64(device):
    with pytest.raises(ValueError, match=r"one of .*, got torch\.float64"):
        long_conv(torch.zeros(1, 2, 3, device=device).double(), torch.zeros(2, 3, device=device))
