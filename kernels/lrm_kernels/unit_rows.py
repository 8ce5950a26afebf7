"""Rows to unit length, as torch's F.normalize gives them, in one launch each way.

    y = x / max(|x|, EPS)

M rows, E channels
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_CHANNELS = 16384  # of a row, which a program holds whole

_ELEMENTS = 4096  # in one program, where a row has fewer
_EPS = tl.constexpr(1e-12)  # of F.normalize


@triton.jit
def unit_scale(x):
    """What makes the rows [M, E] unit: 1 / max(|x|, EPS), and whether |x| is above EPS; [M, 1] both, x in fp32."""
    norm = tl.sqrt(tl.sum(x * x, axis=1))[:, None]
    return 1.0 / tl.maximum(norm, _EPS), norm > _EPS


@triton.jit
def d_unit(x, d_y):
    """The gradient of rows x [M, E] from that of their unit rows, in fp32."""
    scale, long = unit_scale(x)
    along = tl.where(long, tl.sum(x * d_y, axis=1)[:, None] * scale * scale, 0.0)  # a length below EPS is constant
    return scale * (d_y - along * x)


@triton.jit(do_not_specialize=["rows"])
def _unit_rows_kernel(x, y, rows, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_E)
    here = (row < rows)[:, None] & (channels < E)[None, :]
    at = row[:, None] * E + channels[None, :]
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_E]
    scale, _ = unit_scale(value)
    tl.store(y + at, (value * scale).to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _d_unit_rows_kernel(x, d_y, d_x, rows, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_E)
    here = (row < rows)[:, None] & (channels < E)[None, :]
    at = row[:, None] * E + channels[None, :]
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_E]
    gradient = tl.load(d_y + at, mask=here, other=0.0).to(tl.float32)
    tl.store(d_x + at, d_unit(value, gradient).to(d_x.dtype.element_ty), mask=here)


def _launch(kernel, x: Tensor, *others: Tensor) -> None:
    E = x.shape[-1]
    block_e = triton.next_power_of_2(E)
    block_m = max(1, _ELEMENTS // block_e)
    rows = x.numel() // E
    kernel[(triton.cdiv(rows, block_m),)](x, *others, rows, E=E, BLOCK_M=block_m, BLOCK_E=block_e, num_warps=4)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.save_for_backward(x)
        y = torch.empty_like(x, dtype=dtype)
        _launch(_unit_rows_kernel, x, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        _launch(_d_unit_rows_kernel, x, d_y.contiguous(), d_x)
        return d_x, None


def unit_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., E] over its length in the last dimension; computed in fp32, differentiable.

    Args:
        x: float32, float16 or bfloat16, E at most MOST_CHANNELS.
        dtype: of the result; x's by default.

    Raises:
        ValueError: rows that are too long.
    """
    if x.shape[-1] > MOST_CHANNELS:
        raise ValueError(f"a row may have at most {MOST_CHANNELS} channels, got {x.shape[-1]}")
    return _UnitRows.apply(x.contiguous(), x.dtype if dtype is None else dtype)
