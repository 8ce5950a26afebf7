"""A chunk's tokens added up with weights by place and channel, in one launch forward and two backward.

    y[n, d] = sum over u of place[u, d] x[n, u, d]

N chunks of U tokens, D channels

Backward, a program holds a block of the weights and takes the chunks in turns with others that hold the same one; what
each found for the weights is added up in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_kernels.column_sums import MOST_PARTS, column_sums

_CHUNKS, _TOKENS, _CHANNELS = 16, 8, 64  # of the block that a program of the backward pass holds
_WIDE = 128  # channels of a program of the forward pass


@triton.jit(do_not_specialize=["U"])
def _pool_kernel(x, place, y, U, D: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_U, BLOCK_D], dtype=tl.float32)
    for start in range(0, U, BLOCK_U):
        tokens = start + tl.arange(0, BLOCK_U)
        here = (tokens < U)[:, None] & (channels < D)[None, :]
        at = tokens[:, None] * D + channels[None, :]
        value = tl.load(x + chunk * U * D + at, mask=here, other=0.0).to(tl.float32)  # [BLOCK_U, BLOCK_D]
        total += value * tl.load(place + at, mask=here, other=0.0).to(tl.float32)
    tl.store(y + chunk * D + channels, tl.sum(total, axis=0).to(y.dtype.element_ty), mask=channels < D)


@triton.jit(do_not_specialize=["N", "U"])
def _d_pool_kernel(
    x, place, d_y, d_x, part_place, N, U, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    held = (tokens < U)[:, None] & (channels < D)[None, :]
    at = tokens[:, None] * D + channels[None, :]
    w = tl.load(place + at, mask=held, other=0.0).to(tl.float32)  # [BLOCK_U, BLOCK_D]
    total = tl.zeros([BLOCK_U, BLOCK_D], dtype=tl.float32)
    for start in range(tl.program_id(2) * BLOCK_N, N, tl.num_programs(2) * BLOCK_N):
        chunk = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        gradient = tl.load(d_y + chunk[:, None] * D + channels[None, :],
                           mask=(chunk < N)[:, None] & (channels < D)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        gradient = gradient.to(tl.float32)[:, None, :]
        token = chunk[:, None, None] * U * D + at[None, :, :]
        here = (chunk < N)[:, None, None] & held[None, :, :]
        value = tl.load(x + token, mask=here, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_U, BLOCK_D]
        total += tl.sum(value * gradient, axis=0)
        tl.store(d_x + token, (w[None, :, :] * gradient).to(d_x.dtype.element_ty), mask=here)
    tl.store(part_place + tl.program_id(2).to(tl.int64) * U * D + at, total, mask=held)


class _PoolChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, place, dtype):
        ctx.save_for_backward(x, place)
        (N, U, D) = x.shape
        y = x.new_empty(N, D, dtype=dtype)
        block_u, block_d = min(32, triton.next_power_of_2(U)), min(_WIDE, triton.next_power_of_2(D))
        _pool_kernel[(N, triton.cdiv(D, block_d))](
            x, place, y, U, D=D, BLOCK_U=block_u, BLOCK_D=block_d, num_warps=4
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        x, place = ctx.saved_tensors
        (N, U, D) = x.shape
        block_u, block_d = min(_TOKENS, triton.next_power_of_2(U)), min(_CHANNELS, triton.next_power_of_2(D))
        blocks = (triton.cdiv(U, block_u), triton.cdiv(D, block_d))
        splits = max(1, min(triton.cdiv(N, _CHUNKS), MOST_PARTS // (blocks[0] * blocks[1])))
        d_x, parts = torch.empty_like(x), x.new_empty(splits, U * D, dtype=torch.float32)
        _d_pool_kernel[(*blocks, splits)](
            x, place, d_y.contiguous(), d_x, parts, N, U, D=D, BLOCK_N=_CHUNKS, BLOCK_U=block_u, BLOCK_D=block_d,
            num_warps=4,
        )  # fmt: skip
        return d_x, column_sums(parts, place.dtype).view(U, D), None


def pool_chunks(tokens: Tensor, place: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Tokens of chunks to one vector each, added up in fp32; differentiable, the same in every run.

    Args:
        tokens: [B, N, U, D] float32, float16 or bfloat16.
        place: [U, D], in any of these dtypes.
        dtype: of the result; the tokens' by default.

    Returns:
        [B, N, D].

    Raises:
        ValueError: a place of another shape than a chunk's.
    """
    if tokens.dim() != 4 or place.shape != tokens.shape[2:]:
        raise ValueError(f"place must have the shape [U, D] of the chunks of tokens [B, N, U, D] "
                         f"{tuple(tokens.shape)}, got {tuple(place.shape)}")
    dtype = tokens.dtype if dtype is None else dtype
    pooled = _PoolChunks.apply(tokens.flatten(0, 1).contiguous(), place.contiguous(), dtype)  # [B N, D]
    return pooled.unflatten(0, tokens.shape[:2])
