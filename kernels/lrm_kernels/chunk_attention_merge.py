"""Sums over the partial results of each query: of its chunks, and of the blocks that a long chunk was taken in.

R rows (B T queries), P partial results of a row, h heads computed at a time out of H, d channels
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrm_kernels.chunk_attention_tiles import padded

_ELEMENTS = 4096  # of the output in one program


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["lse"])
def _merge_kernel(
    partials, part_lse, out, lse, rows, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    inside = row < rows
    here = inside[:, None] & (dims < D)[None, :]
    first = (head * rows + row) * P  # of each row's partial results
    if SOFTMAX:
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        for j in range(P):
            top = tl.maximum(top, tl.load(part_lse + first + j, mask=inside, other=float("-inf")))
        top = tl.where(top == float("-inf"), 0.0, top)  # a query without a chunk
        whole = tl.zeros([BLOCK_M], dtype=tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for j in range(P):
        part = tl.load(partials + (first + j)[:, None] * D + dims[None, :], mask=here, other=0.0).to(tl.float32)
        if SOFTMAX:
            share = tl.exp2(tl.load(part_lse + first + j, mask=inside, other=float("-inf")) - top)
            whole += share
            part *= share[:, None]
        total += part
    if SOFTMAX:
        whole = tl.where(whole > 0.0, whole, 1.0)
        total /= whole[:, None]
        tl.store(lse + head * rows + row, top + tl.log2(whole), mask=inside)
    tl.store(out + (row[:, None] * H + head) * D + dims[None, :], total.to(out.dtype.element_ty), mask=here)


def merge(partials: Tensor, out: Tensor, first_head: int, part_lse: Tensor | None = None, lse: Tensor | None = None):
    """Write the heads `first_head` to `first_head + h - 1` of `out`.

    Args:
        partials: [h, R, P, d].
        out: [R, H, d], contiguous, written.
        part_lse: [h, R, P] fp32: each partial result is a softmax's average, this the base-2 logarithm of its
            denominator, and the merge is the average of one softmax over all. None for a plain sum.
        lse: [h, R] fp32, written: the logarithm of the merged denominator; anything where there is no chunk.
    """
    heads, rows, parts, head_dim = partials.shape
    block_d = padded(head_dim)
    block_m = max(1, _ELEMENTS // block_d)
    _merge_kernel[(triton.cdiv(rows, block_m), heads)](
        partials, partials if part_lse is None else part_lse, out[:, first_head:], partials if lse is None else lse,
        rows, H=out.shape[1], D=head_dim, P=parts, BLOCK_M=block_m, BLOCK_D=block_d, SOFTMAX=part_lse is not None,
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["products"])
def _row_dot_kernel(
    a, b, products, rows, stride_head, stride_row, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    here = (row < rows)[:, None] & (dims < D)[None, :]
    x = tl.load(a + head * stride_head + row[:, None] * stride_row + dims[None, :], mask=here, other=0.0)
    y = tl.load(b + ((row // P)[:, None] * H + head) * D + dims[None, :], mask=here, other=0.0)
    product = tl.sum(x.to(tl.float32) * y.to(tl.float32), axis=1)
    tl.store(products + head * rows + row, product, mask=row < rows)


def row_dot(a: Tensor, b: Tensor, products: Tensor, first_head: int) -> None:
    """Inner products of the rows of `a` with those of heads of `b`; row r of `a` meets row r // P of `b`.

    Args:
        a: [h, R P, d], its last dimension contiguous.
        b: [R, H, d], contiguous.
        products: [h, R P] fp32, contiguous, written.
        first_head: of `b`.
    """
    heads, rows, head_dim = a.shape
    block_d = padded(head_dim)
    block_m = max(1, _ELEMENTS // block_d)
    _row_dot_kernel[(triton.cdiv(rows, block_m), heads)](
        a, b[:, first_head:], products, rows, a.stride(0), a.stride(1), H=b.shape[1], D=head_dim,
        P=rows // b.shape[0], BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
