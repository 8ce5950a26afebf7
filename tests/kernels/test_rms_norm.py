"""RMS norms of many rows, with what stands beside them, against torch."""

import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from resona_kernel_checks import DEVICE, EPS, TOLERANCE, Draw, assert_agrees, with_gradients

from lrm_kernels.rms_norm import add_rms_norm, rms_norm
from lrm_recall.ops.norm import add_rms_norm_torch, gated_rms_norm_torch, rms_norm_torch

SHAPES = [(1, 1, 3), (2, 7, 33), (1, 300, 200), (1, 2, 1030), (2, 3, 4, 24)]


def gated(x, weight, eps, gate):
    return gated_rms_norm_torch(x, gate, weight, eps)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain(shape, dtype):
    draw = Draw(dtype)
    assert_agrees(rms_norm, rms_norm_torch, [draw.leaf(*shape), draw.leaf(shape[-1]), EPS], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_before_a_gate(shape, dtype):
    draw = Draw(dtype)
    inputs = [draw.leaf(*shape), draw.leaf(shape[-1]), EPS, draw.leaf(*shape)]
    assert_agrees(rms_norm, gated, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "stream"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                               (torch.bfloat16, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES)
def test_behind_a_residual_connection(shape, dtype, stream):
    draw = Draw(dtype)
    inputs = [draw.leaf(*shape), Draw(stream, seed=1).leaf(*shape), draw.leaf(shape[-1]), EPS]
    rounded = 1e-2 if stream == torch.bfloat16 else 0  # the sum, before it is normalised; the interpreter cuts it
    results, gradients = assert_agrees(add_rms_norm, add_rms_norm_torch, inputs, max(TOLERANCE[dtype], rounded))
    assert [x.dtype for x in (*results, *gradients)] == [dtype, stream, dtype, stream, dtype]


@pytest.mark.parametrize("read", [0, 1])
def test_where_one_result_of_two_is_read(read):
    draw = Draw()
    inputs = [draw.leaf(2, 9, 33), draw.leaf(2, 9, 33), draw.leaf(33), EPS]

    def one(function):
        def run(x, stream, weight, eps):
            return function(x, stream, weight, eps)[read] + 0 * weight.sum()  # the sum alone does not need the weight
        return run

    assert_agrees(one(add_rms_norm), one(add_rms_norm_torch), inputs)


def test_rows_that_do_not_lie_side_by_side():
    draw = Draw()
    x, gate = draw.leaf(2, 5, 3, 20).transpose(1, 2), draw.leaf(2, 3, 5, 50)[..., 7:27]
    expected = gated(x, weight := draw.leaf(20), EPS, gate)
    assert_close(rms_norm(x, weight, EPS, gate), expected)


def test_weights_of_another_dtype():
    x, weight = Draw(torch.bfloat16).leaf(1, 6, 16), Draw().leaf(16)
    y = rms_norm(x, weight, EPS)
    d_x, d_weight = torch.autograd.grad(y.float().square().sum(), [x, weight])
    assert (y.dtype, d_x.dtype, d_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.floats(0.01, 100))
def test_rows_of_any_scale_have_one_size(rows, D, scale):
    x = Draw(seed=rows).leaf(rows, D).detach() * scale
    y = rms_norm(x, torch.ones(D, device=DEVICE), 1e-12)
    assert_close(y.square().mean(-1), torch.ones(rows, device=DEVICE), 1e-4)


def test_without_eps_the_rows_that_are_not_there_add_nothing():
    x, weight = Draw().leaf(3, 33), Draw(seed=1).leaf(33)  # a program takes more than three
    assert_agrees(rms_norm, rms_norm_torch, [x, weight, 0.0])


def test_the_same_in_every_run():
    draw = Draw(torch.bfloat16)
    inputs = [draw.leaf(1, 1000, 20), draw.leaf(20), EPS, draw.leaf(1, 1000, 20)]
    first, second = (sum(with_gradients(rms_norm, inputs), []) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x[:0], x[0], EPS), r"got shape \(0, 4\)"),
        (lambda x: rms_norm(x.new_zeros(1, 20_000), x[0], EPS), r"rows of 1 to 16384 channels, got shape \(1, 20000\)"),
        (lambda x: rms_norm(x, x[0, :3], EPS), r"the weight must be \[4\], as rows of the input are, got \[3\]"),
        (lambda x: rms_norm(x, x[0], EPS, x[:1]), r"its input, \(2, 4\), got \(1, 4\)"),
        (lambda x: add_rms_norm(x, x[:1], x[0], EPS), r"its input, \(2, 4\), got \(1, 4\)"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4, device=DEVICE))
