"""A mixer's output and what was retrieved, mixed where a position found a chunk, in one launch each way.

    y = alpha * mixed + (1 - alpha) * retrieved     where any of a position's k indices is not -1, else mixed

M positions, D channels, k chunks a position
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_CHANNELS = 16384  # of a row, which a program holds whole

_ELEMENTS = 4096  # in one program, where a row has fewer


@triton.jit
def _found(indices, row, inside, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether each position found a chunk: [BLOCK_M, 1]."""
    slots = tl.arange(0, BLOCK_K)
    index = tl.load(indices + row[:, None] * K + slots[None, :],
                    mask=inside[:, None] & (slots < K)[None, :], other=-1)  # [BLOCK_M, BLOCK_K]
    return (tl.max((index != -1).to(tl.int32), axis=1) > 0)[:, None]


@triton.jit(do_not_specialize=["rows"])
def _mix_kernel(
    mixed, retrieved, indices, share, alpha, y, rows, D: tl.constexpr, K: tl.constexpr, LEARNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    found = _found(indices, row, inside, K, BLOCK_K)
    if LEARNED:
        alpha = tl.load(share + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    channels = tl.arange(0, BLOCK_D)
    here = inside[:, None] & (channels < D)[None, :]
    at = row[:, None] * D + channels[None, :]
    own = tl.load(mixed + at, mask=here, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    other = tl.load(retrieved + at, mask=here & found, other=0.0).to(tl.float32)
    value = tl.where(found, alpha * own + (1.0 - alpha) * other, own)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _d_mix_kernel(
    mixed, retrieved, indices, share, alpha, d_y, d_mixed, d_retrieved, d_share, rows, D: tl.constexpr,
    K: tl.constexpr, LEARNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    found = _found(indices, row, inside, K, BLOCK_K)
    channels = tl.arange(0, BLOCK_D)
    here = inside[:, None] & (channels < D)[None, :]
    at = row[:, None] * D + channels[None, :]
    gradient = tl.load(d_y + at, mask=here, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if LEARNED:
        alpha = tl.load(share + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        own = tl.load(mixed + at, mask=here & found, other=0.0).to(tl.float32)
        other = tl.load(retrieved + at, mask=here & found, other=0.0).to(tl.float32)
        tl.store(d_share + row, tl.sum(gradient * (own - other), axis=1).to(d_share.dtype.element_ty), mask=inside)
    tl.store(d_mixed + at, tl.where(found, alpha * gradient, gradient).to(d_mixed.dtype.element_ty), mask=here)
    gradient = tl.where(found, (1.0 - alpha) * gradient, 0.0)
    tl.store(d_retrieved + at, gradient.to(d_retrieved.dtype.element_ty), mask=here)


def _sizes(mixed: Tensor, indices: Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    """Rows, the grid, and what a kernel is compiled for."""
    D, K = mixed.shape[-1], indices.shape[-1]
    block_d = triton.next_power_of_2(D)
    block_m = max(1, _ELEMENTS // block_d)
    rows = mixed.numel() // D
    blocks = dict(D=D, K=K, BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_K=triton.next_power_of_2(K), num_warps=4)
    return rows, (triton.cdiv(rows, block_m),), blocks


class _MixRetrieved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, retrieved, indices, alpha):
        learned = isinstance(alpha, Tensor)
        share, ctx.alpha = (alpha, 0.0) if learned else (None, alpha)
        # the gradient of a number alpha needs neither of the two outputs
        ctx.save_for_backward(*((mixed, retrieved) if learned else (None, None)), indices, share)
        ctx.dtypes = mixed.dtype, retrieved.dtype
        y = torch.empty_like(mixed, dtype=torch.promote_types(mixed.dtype, retrieved.dtype))
        rows, grid, sizes = _sizes(mixed, indices)
        _mix_kernel[grid](mixed, retrieved, indices, share if learned else mixed, ctx.alpha, y, rows, LEARNED=learned,
                          **sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        mixed, retrieved, indices, share = ctx.saved_tensors
        learned, d_y = share is not None, d_y.contiguous()
        d_mixed, d_retrieved = (torch.empty_like(d_y, dtype=dtype) for dtype in ctx.dtypes)
        d_share = torch.empty_like(share) if learned else None
        rows, grid, sizes = _sizes(d_y, indices)
        own, other, weight, d_weight = (mixed, retrieved, share, d_share) if learned else (d_y,) * 4  # not read
        _d_mix_kernel[grid](own, other, indices, weight, ctx.alpha, d_y, d_mixed, d_retrieved, d_weight, rows,
                            LEARNED=learned, **sizes)
        return d_mixed, d_retrieved, None, d_share


def mix_retrieved(mixed: Tensor, retrieved: Tensor, indices: Tensor, alpha: float | Tensor) -> Tensor:
    """alpha * mixed + (1 - alpha) * retrieved where a chunk was found, elsewhere mixed; differentiable.

    Args:
        mixed, retrieved: [B, T, D] float32, float16 or bfloat16, D at most MOST_CHANNELS.
        indices: [B, T, k] int64, -1 where there is no chunk.
        alpha: a number, or [B, T, 1] in any of these dtypes.

    Returns:
        [B, T, D] in the wider of both dtypes, computed in fp32.

    Raises:
        ValueError: shapes that do not fit, or rows that are too long.
    """
    D, positions = mixed.shape[-1], tuple(mixed.shape[:-1])
    if retrieved.shape != mixed.shape or tuple(indices.shape[:-1]) != positions or not 1 <= D <= MOST_CHANNELS:
        raise ValueError(f"mixed and retrieved [B, T, D] and indices [B, T, k] must agree, with D from 1 to "
                         f"{MOST_CHANNELS}, got {tuple(mixed.shape)}, {tuple(retrieved.shape)}, "
                         f"{tuple(indices.shape)}")
    if isinstance(alpha, Tensor) and tuple(alpha.shape) != (*positions, 1):
        raise ValueError(f"alpha must have the shape {[*positions, 1]}, got {list(alpha.shape)}")
    share = alpha.contiguous() if isinstance(alpha, Tensor) else float(alpha)
    return _MixRetrieved.apply(mixed.contiguous(), retrieved.contiguous(), indices.contiguous(), share)
