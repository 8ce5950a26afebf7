"""Long causal depthwise convolutions as products with Toeplitz matrices that are never in memory.

    y[b, t, d] = sum over s <= t of kernel[t - s, d] * x[b, s, d]

For a channel that is Y = X M, rows of the batch times the Toeplitz matrix M[s, t] = kernel[t - s], zero below its
diagonal. A program holds a tile of Y and runs over the tiles of X that it can see; it reads each tile of M from the
filter, one tap an element, which the first-level cache holds. Tiles of later inputs are not visited, and within a tile
their factors are zeros: no output depends on a later input, not even by rounding. T^2 products for each row of the
batch, where an FFT takes T log T, but on tensor cores and with nothing else in memory.

Symbols
    B batch, T tokens, D channels, L taps of the filter (at most T)
    rows [D, B, T]  channels first, what the products read: with T last, loads of a tile are whole cache lines, where
        [B, T, D] would bring eight channels for every one that is wanted, again for every tile. `_transpose_kernel`
        is once through memory each way. A caller that keeps rows (x with the strides of such a tensor) gets rows
        back, and nothing is moved.
    offset  how many tiles a tile of outputs lies behind one of inputs
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE_T, _TILE_B = 64, 128  # of the outputs that a program holds
_DEPTH = {"tf32": 32, "ieee": 16}  # tokens, or rows, of one step; without tensor cores the factors fill registers
_WARPS = {"tf32": 4, "ieee": 8}
_PROGRAMS = 512  # with fewer tiles of products, programs share the batch of each
_TRANSPOSED = 64


@triton.jit
def _transpose_kernel(x, y, rows, columns, x_batch, x_row, y_batch, y_row, BLOCK: tl.constexpr):
    """y[b, j, i] = x[b, i, j], the last stride of both 1."""
    tiles = tl.cdiv(rows, BLOCK)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i = (tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tile = tl.load(x + batch * x_batch + i[:, None] * x_row + j[None, :], mask=inside, other=0.0)  # [i, j]
    tl.store(y + batch * y_batch + j[:, None] * y_row + i[None, :], tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def _conv_kernel(
    x, kernel, y, B, T, L, ANTICAUSAL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows to rows. Anticausal is with M transposed: y[b, t] = sum over s >= t of kernel[s - t] * x[b, s]."""
    tiles = tl.cdiv(T, BLOCK_T)
    channel = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_T
    row = tl.program_id(0) // tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    t = first + tl.arange(0, BLOCK_T)
    at_row = ((channel * B + row) * T)[:, None]
    if ANTICAUSAL:
        begin = first
        end = tl.minimum(T, first + BLOCK_T + L - 1)
    else:
        begin = tl.maximum(0, first - L + 1) // BLOCK_S * BLOCK_S
        end = tl.minimum(T, first + BLOCK_T)
    total = tl.zeros([BLOCK_B, BLOCK_T], dtype=tl.float32)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inputs = tl.load(x + at_row + s[None, :], mask=(row < B)[:, None] & (s < T)[None, :], other=0.0)
        lag = s[:, None] - t[None, :] if ANTICAUSAL else t[None, :] - s[:, None]  # [BLOCK_S, BLOCK_T]
        toeplitz = tl.load(kernel + channel * L + lag, mask=(lag >= 0) & (lag < L), other=0.0)
        total = tl.dot(inputs.to(tl.float32), toeplitz, total, input_precision=PRECISION)
    tl.store(y + at_row + t[None, :], total.to(y.dtype.element_ty), mask=(row < B)[:, None] & (t < T)[None, :])


@triton.jit
def _products_kernel(
    x, grad, products, B, T, D, offsets, parts, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The sum of grad^T x over the batch and over all pairs of tiles of one offset; its diagonals belong to one lag."""
    offset, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    channel = tl.program_id(1).to(tl.int64)
    tiles, blocks = tl.cdiv(T, BLOCK_T), tl.cdiv(B, BLOCK_B)
    first = part * blocks // parts
    count = (part + 1) * blocks // parts - first  # blocks of the batch that this part adds, at least 1
    at = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    for step in range(0, (tiles - offset) * count):
        s = step // count * BLOCK_T + at
        t = s + offset * BLOCK_T
        row = (first + step % count) * BLOCK_B + tl.arange(0, BLOCK_B)
        at_row, inside = ((channel * B + row) * T)[:, None], (row < B)[:, None]
        later = tl.load(grad + at_row + t[None, :], mask=inside & (t < T)[None, :], other=0.0)  # [BLOCK_B, BLOCK_T]
        inputs = tl.load(x + at_row + s[None, :], mask=inside & (s < T)[None, :], other=0.0)
        total = tl.dot(tl.trans(later.to(tl.float32)), inputs.to(tl.float32), total, input_precision=PRECISION)
    to = ((part * D + channel) * offsets + offset) * BLOCK_T * BLOCK_T
    tl.store(products + to + at[:, None] * BLOCK_T + at[None, :], total)


@triton.jit
def _diagonals_kernel(products, grad_kernel, D, L, offsets, parts, BLOCK_T: tl.constexpr):
    """BLOCK_T taps of the filter's gradient: element [i, j] of an offset's products is of lag offset * BLOCK_T + i - j.

    Lag r behind the first is in row i at column i - r; where there is no such column, the tile one offset further on
    has it.
    """
    offset, channel = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BLOCK_T)
    i = r[:, None]
    wraps = (i < r[None, :]).to(tl.int32)  # [i, r]
    inside = offset + wraps < offsets
    within = (offset + wraps) * BLOCK_T * BLOCK_T + i * BLOCK_T + i - r[None, :] + wraps * BLOCK_T
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for part in range(0, parts):
        of_channel = (part * D + channel) * offsets * BLOCK_T * BLOCK_T
        total += tl.sum(tl.load(products + of_channel + within, mask=inside, other=0.0), axis=0)
    lag = offset * BLOCK_T + r
    tl.store(grad_kernel + channel * L + lag, total, mask=lag < L)


class _LongConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, precision: str) -> Tensor:
        rows, taps = _to_rows(x), kernel.T.float().contiguous()  # [D, B, T], [D, L]
        ctx.save_for_backward(rows, taps)
        ctx.precision, ctx.kernel_dtype, ctx.as_rows = precision, kernel.dtype, _is_rows(x)
        return _from_rows(_convolved(rows, taps, precision), ctx.as_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, taps = ctx.saved_tensors
        grad, grad_x, grad_kernel = _to_rows(grad), None, None  # [D, B, T]
        if ctx.needs_input_grad[0]:
            grad_x = _from_rows(_convolved(grad, taps, ctx.precision, anticausal=True), ctx.as_rows)
        if ctx.needs_input_grad[1]:
            grad_kernel = _correlated(rows, grad, taps.shape[1], ctx.precision).T.to(ctx.kernel_dtype)  # [L, D]
        return grad_x, grad_kernel, None


def _is_rows(x: Tensor) -> bool:
    """Whether x [B, T, D] lies in memory as contiguous rows [D, B, T]."""
    return x.permute(2, 0, 1).is_contiguous()


def _to_rows(x: Tensor) -> Tensor:
    """x [B, T, D] as rows [D, B, T], moved only if it does not lie so."""
    B, T, D = x.shape
    if _is_rows(x) or x.stride(2) != 1:
        return x.permute(2, 0, 1).contiguous()  # as it is, or one copy by torch
    rows = x.new_empty(D, B, T)
    grid = (B * triton.cdiv(T, _TRANSPOSED), triton.cdiv(D, _TRANSPOSED))
    _transpose_kernel[grid](x, rows, T, D, x.stride(0), x.stride(1), T, B * T, BLOCK=_TRANSPOSED)
    return rows


def _from_rows(rows: Tensor, as_rows: bool) -> Tensor:
    """Rows [D, B, T] as [B, T, D]: a view of them, or contiguous."""
    if as_rows:
        return rows.permute(1, 2, 0)
    D, B, T = rows.shape
    y = rows.new_empty(B, T, D)
    grid = (B * triton.cdiv(D, _TRANSPOSED), triton.cdiv(T, _TRANSPOSED))
    _transpose_kernel[grid](rows, y, D, T, T, B * T, T * D, D, BLOCK=_TRANSPOSED)
    return y


def _padded(size: int, most: int) -> int:
    """The side of a tile for `size` elements: a power of two that tensor cores take."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _convolved(rows: Tensor, taps: Tensor, precision: str, *, anticausal: bool = False) -> Tensor:
    """Rows [D, B, T] convolved with taps [D, L]."""
    D, B, T = rows.shape
    y = torch.empty_like(rows)
    block_b, block_t = _padded(B, _TILE_B), _padded(T, _TILE_T)
    _conv_kernel[(triton.cdiv(B, block_b) * triton.cdiv(T, block_t), D)](
        rows, taps, y, B, T, taps.shape[1], ANTICAUSAL=anticausal, BLOCK_B=block_b, BLOCK_T=block_t,
        BLOCK_S=min(block_t, _DEPTH[precision]), PRECISION=precision, num_warps=_WARPS[precision], num_stages=3,
    )  # fmt: skip
    return y


def _correlated(rows: Tensor, grad: Tensor, L: int, precision: str) -> Tensor:
    """The sum over b and t of rows[d, b, t - lag] * grad[d, b, t], for lags below L: [D, L] fp32."""
    D, B, T = rows.shape
    block_b, block_t = _padded(B, _DEPTH[precision]), _padded(T, _TILE_T)
    offsets = min(triton.cdiv(T, block_t), (L - 2) // block_t + 2)  # of those further on, every lag is L or more
    parts = max(1, min(triton.cdiv(B, block_b), _PROGRAMS // (D * offsets)))
    products = rows.new_empty(parts, D, offsets, block_t, block_t, dtype=torch.float32)
    _products_kernel[(offsets * parts, D)](
        rows, grad, products, B, T, D, offsets, parts, BLOCK_B=block_b, BLOCK_T=block_t, PRECISION=precision,
        num_warps=_WARPS[precision], num_stages=3,
    )  # fmt: skip
    grad_taps = rows.new_empty(D, L, dtype=torch.float32)
    _diagonals_kernel[(triton.cdiv(L, block_t), D)](products, grad_taps, D, L, offsets, parts, BLOCK_T=block_t)
    return grad_taps


def long_conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of every channel with its filter; differentiable once, and the same in every run.

    fp32 inputs are multiplied in fp32 where torch.get_float32_matmul_precision() is "highest", else in tf32. Inputs of
    16 bits are exact in tf32; a filter in fp32 is then rounded to its 11 bits, finer than the output's 8 (bf16) and as
    fine as its 11 (fp16). Sums are fp32. The host never waits for the device.

    Args:
        x: [B, T, D] in one of DTYPES; fastest with the strides of a contiguous [D, B, T], which the result then has.
        kernel: [L, D], any floating dtype; L at least 1 and at most T.

    Returns:
        [B, T, D] in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, or a dtype that the kernels do not take.
    """
    if x.dim() != 3 or kernel.dim() != 2 or kernel.shape[1] != x.shape[2]:
        raise ValueError(f"x must be [B, T, D] and kernel [L, D], got {list(x.shape)} and {list(kernel.shape)}")
    if x.numel() == 0 or not 1 <= kernel.shape[0] <= x.shape[1]:
        raise ValueError(f"a filter must have 1 to T taps and x must not be empty, got {kernel.shape[0]} taps for "
                         f"x {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
    tf32 = x.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    return _LongConv.apply(x, kernel, "tf32" if tf32 else "ieee")
