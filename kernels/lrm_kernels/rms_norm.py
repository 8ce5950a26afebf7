"""RMS norm of many rows, differentiable, fused with what stands beside it in a block.

    y = x / sqrt(mean(x^2) + eps) * weight

behind a residual connection (x is the sum of a branch and the stream, which is returned too), before a gate
(y * silu(gate)), or of a memory that three read: what the three send back is added where it is read, in fp32, so that
no sum of theirs is ever in memory.

A row is read once forward and once backward, at the speed of memory. `lrm_kernels.row_norm` is for decoding's few rows.

M rows, D channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_kernels.column_sums import column_sums

MOST_CHANNELS = 16384  # of a row, which a program holds whole

_ELEMENTS = 2048  # in one program, where a row has fewer
_PROGRAMS = 512  # of the backward pass: enough loads in flight, and few enough parts of the weight's gradient


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x, weight, gate, stream, total, y, rows, eps, D: tl.constexpr, ADD: tl.constexpr, GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    here = (row < rows)[:, None] & (channels < D)[None, :]
    at = row[:, None] * D + channels[None, :]
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if ADD:
        summed = (value + tl.load(stream + at, mask=here, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, summed, mask=here)
        value = summed.to(tl.float32)  # as the backward pass will read it
    w = tl.load(weight + channels, mask=channels < D, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None] * w[None, :]
    if GATE:
        g = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
        value *= g * tl.sigmoid(g)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _d_norm_kernel(
    x, weight, gate, d_total, d_y_0, d_y_1, d_y_2, d_x, d_branch, d_gate, d_weight, rows, eps, D: tl.constexpr,
    READERS: tl.constexpr, SUM: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK_D)
    w = tl.load(weight + channels, mask=channels < D, other=0.0).to(tl.float32)[None, :]
    d_w = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        here = (row < rows)[:, None] & (channels < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + channels[None, :]
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        d_y = tl.load(d_y_0 + at, mask=here, other=0.0).to(tl.float32)
        if READERS > 1:
            d_y += tl.load(d_y_1 + at, mask=here, other=0.0).to(tl.float32)
        if READERS > 2:
            d_y += tl.load(d_y_2 + at, mask=here, other=0.0).to(tl.float32)
        scale = tl.where(row < rows, tl.rsqrt(tl.sum(value * value, axis=1) / D + eps), 0.0)[:, None]
        unit = value * scale
        if GATE:
            g = tl.load(gate + at, mask=here, other=0.0).to(tl.float32)
            share = tl.sigmoid(g)
            d_g = d_y * unit * w * share * (1 + g * (1 - share))
            tl.store(d_gate + at, d_g.to(d_gate.dtype.element_ty), mask=here)
            d_y *= g * share
        d_w += d_y * unit
        d_y *= w
        gradient = scale * (d_y - unit * (tl.sum(d_y * unit, axis=1) / D)[:, None])
        if SUM:
            gradient += tl.load(d_total + at, mask=here, other=0.0).to(tl.float32)
        tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask=here)
        if BRANCH:
            tl.store(d_branch + at, gradient.to(d_branch.dtype.element_ty), mask=here)
    place = d_weight + tl.program_id(0).to(tl.int64) * D + channels
    tl.store(place, tl.sum(d_w, axis=0), mask=channels < D)


def _blocks(x: Tensor) -> tuple[int, dict[str, int]]:
    """Programs that take all rows once, and the sizes that a kernel is compiled for."""
    D = x.shape[-1]
    block_d = triton.next_power_of_2(D)
    block_m = max(1, _ELEMENTS // block_d)
    warps = min(16, max(4, block_d // 512))
    return triton.cdiv(x.numel() // D, block_m), dict(D=D, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps)


def _forward(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, stream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y, and what was normalised: x, or the sum of x and the stream."""
    y, total = torch.empty_like(x), x if stream is None else torch.empty_like(stream)
    programs, sizes = _blocks(x)
    _norm_kernel[(programs,)](
        x, weight, x if gate is None else gate, x if stream is None else stream, total, y, x.numel() // x.shape[-1],
        eps, ADD=stream is not None, GATE=gate is not None, **sizes,
    )  # fmt: skip
    return y, total


def _backward(
    x: Tensor, weight: Tensor, eps: float, d_y: list[Tensor], gate: Tensor | None = None,
    d_total: Tensor | None = None, branch: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of what was normalised, the weight, the gate, and of the first once more in the dtype of the branch.

    Args:
        x: what was normalised.
        d_y: one to three gradients of y.
        d_total: what else comes back to x.
    """
    programs, sizes = _blocks(x)
    programs = min(programs, _PROGRAMS)
    d_x, parts = torch.empty_like(x), x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    d_branch = d_x if branch in (None, x.dtype) else torch.empty_like(x, dtype=branch)
    d_gate = None if gate is None else torch.empty_like(gate)
    _d_norm_kernel[(programs,)](
        x, weight, x if gate is None else gate, x if d_total is None else d_total, d_y[0], d_y[-1], d_y[len(d_y) // 2],
        d_x, d_branch, d_x if d_gate is None else d_gate, parts, x.numel() // x.shape[-1], eps, READERS=len(d_y),
        SUM=d_total is not None, BRANCH=d_branch is not d_x, GATE=gate is not None, **sizes,
    )  # fmt: skip
    return d_x, column_sums(parts, weight.dtype), d_gate, d_branch


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, gate):
        ctx.save_for_backward(x, weight, gate)
        ctx.eps = eps
        return _forward(x, weight, eps, gate)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, weight, gate = ctx.saved_tensors
        d_x, d_weight, d_gate, _ = _backward(x, weight, ctx.eps, [d_y.contiguous()], gate)
        return d_x, d_weight, None, d_gate


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stream, weight, eps):
        y, total = _forward(x, weight, eps, stream=stream)
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.branch = eps, x.dtype
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_total):
        total, weight = ctx.saved_tensors
        if d_y is None:
            return (None if d_total is None else d_total.to(ctx.branch)), d_total, None, None
        d_total = None if d_total is None else d_total.contiguous()
        d_stream, d_weight, _, d_x = _backward(total, weight, ctx.eps, [d_y.contiguous()], None, d_total, ctx.branch)
        return d_x, d_stream, d_weight, None


class _MemoryNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        y, _ = _forward(x, weight, eps)
        return y, y.view_as(y), y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        d_y = [gradient.contiguous() for gradient in gradients if gradient is not None]
        if not d_y:
            return None, None, None
        return *_backward(x, weight, ctx.eps, d_y)[:2], None


def fits(x: Tensor) -> bool:
    """Whether x [..., D] has rows, none of them longer than MOST_CHANNELS."""
    return x.numel() > 0 and x.shape[-1] <= MOST_CHANNELS


def _checked(weight: Tensor, x: Tensor, *like_x: Tensor) -> list[Tensor]:
    """All of them contiguous."""
    if not fits(x):
        raise ValueError(f"an RMS norm takes rows of 1 to {MOST_CHANNELS} channels, got shape {tuple(x.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight must be [{x.shape[-1]}], as rows of the input are, got {list(weight.shape)}")
    if wrong := [tuple(tensor.shape) for tensor in like_x if tensor.shape != x.shape]:
        raise ValueError(f"what stands beside an RMS norm has the shape of its input, {tuple(x.shape)}, got {wrong[0]}")
    return [tensor.contiguous() for tensor in (weight, x, *like_x)]


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """The RMS norm of x, times silu(gate) where there is a gate; differentiable.

    Args:
        x: [..., D] float32, float16 or bfloat16, not empty, D at most MOST_CHANNELS.
        weight: [D], in any of these dtypes.
        eps: added to the mean square.
        gate: [..., D], in any of these dtypes.

    Returns:
        [..., D] in x's dtype, computed in fp32.

    Raises:
        ValueError: rows that are too long, or none; a weight or a gate of another shape.
    """
    weight, x, *gates = _checked(weight, x, *(() if gate is None else (gate,)))
    return _RMSNorm.apply(x, weight, eps, *(gates or (None,)))


def add_rms_norm(x: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual connection and the norm behind it; differentiable.

    Args:
        x: [..., D], what a branch adds; as for `rms_norm`.
        stream: [..., D], the residual stream, in any of these dtypes.
        weight, eps: as for `rms_norm`.

    Returns:
        the norm of the sum [..., D] in x's dtype, and the sum in the stream's, of which the norm is taken.

    Raises:
        ValueError: rows that are too long, or none; a weight or a stream of another shape.
    """
    weight, x, stream = _checked(weight, x, stream)
    return _AddRMSNorm.apply(x, stream, weight, eps)


def memory_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The RMS norm of x, three times the same memory; differentiable.

    Args:
        x, weight, eps: as for `rms_norm`.

    Returns:
        [..., D] in x's dtype, computed in fp32: for three readers, whose gradients are added up in fp32.

    Raises:
        ValueError: rows that are too long, or none; a weight of another shape.
    """
    weight, x = _checked(weight, x)
    return _MemoryNorm.apply(x, weight, eps)
