"""RMS norm of a memory that three read: the search, the keys and the values.

    y = x / sqrt(mean(x^2) + eps) * weight

What the three send back is added where it is read, in fp32, so that no sum of theirs is ever in memory.

M rows, D channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_kernels.column_sums import MOST_PARTS, column_sums

MOST_CHANNELS = 16384  # of a row, which a program holds whole

_ELEMENTS = 2048  # in one program, where a row has fewer


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(x, weight, y, rows, eps, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    here = (row < rows)[:, None] & (channels < D)[None, :]
    at = row[:, None] * D + channels[None, :]
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    w = tl.load(weight + channels, mask=channels < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)
    tl.store(y + at, (value * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _d_norm_kernel(
    x, weight, d_y_0, d_y_1, d_y_2, d_x, d_weight, rows, eps, D: tl.constexpr, READERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK_D)
    w = tl.load(weight + channels, mask=channels < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
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
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)[:, None]
        unit = value * scale
        total += d_y * unit
        d_y *= w
        gradient = scale * (d_y - unit * (tl.sum(d_y * unit, axis=1) / D)[:, None])
        tl.store(d_x + at, gradient.to(d_x.dtype.element_ty), mask=here)
    place = d_weight + tl.program_id(0).to(tl.int64) * D + channels
    tl.store(place, tl.sum(total, axis=0), mask=channels < D)


def _blocks(x: Tensor) -> tuple[int, dict[str, int]]:
    """Programs that take all rows once, and the sizes that a kernel is compiled for."""
    D = x.shape[-1]
    block_d = triton.next_power_of_2(D)
    block_m = max(1, _ELEMENTS // block_d)
    warps = min(16, max(4, block_d // 512))
    return triton.cdiv(x.numel() // D, block_m), dict(D=D, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps)


class _MemoryNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        y = torch.empty_like(x)
        programs, sizes = _blocks(x)
        _norm_kernel[(programs,)](x, weight, y, x.numel() // x.shape[-1], eps, **sizes)
        return y, y.view_as(y), y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        d_y = [gradient.contiguous() for gradient in gradients if gradient is not None]
        if not d_y:
            return None, None, None
        programs, sizes = _blocks(x)
        programs = min(programs, MOST_PARTS)
        d_x, parts = torch.empty_like(x), x.new_empty(programs, x.shape[-1], dtype=torch.float32)
        _d_norm_kernel[(programs,)](
            x, weight, d_y[0], d_y[-1], d_y[len(d_y) // 2], d_x, parts, x.numel() // x.shape[-1], ctx.eps,
            READERS=len(d_y), **sizes,
        )  # fmt: skip
        return d_x, column_sums(parts, weight.dtype), None


def memory_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The RMS norm of x, three times the same memory, differentiable.

    Args:
        x: [..., D] float32, float16 or bfloat16, not empty, D at most MOST_CHANNELS.
        weight: [D], in any of these dtypes.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype, computed in fp32: for three readers, whose gradients are added up in fp32.

    Raises:
        ValueError: rows that are too long, or none.
    """
    if x.shape[-1] > MOST_CHANNELS or x.numel() == 0:
        raise ValueError(f"memory_norm takes rows of 1 to {MOST_CHANNELS} channels, got shape {tuple(x.shape)}")
    return _MemoryNorm.apply(x.contiguous(), weight.contiguous(), eps)
