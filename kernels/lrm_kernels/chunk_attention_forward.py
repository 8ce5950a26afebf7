"""Forward pass of `chunk_attention`: a program holds one chunk of one head and runs over the queries that chose it.

Symbols
    B  batch    T  query positions    H  heads    d  head_dim    N  chunks of U tokens    k  chunks a query
    R  rows of queries, B T           S  slots: choices, R k     G  chunks in all, B N    M  queries in one product
With k = 1 a program writes its queries' outputs; otherwise it writes partial outputs, one a slot, of a few heads at a
time, which `merge` adds up. The same scratch serves all heads, so that much of it never leaves the L2 cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrm_kernels.chunk_attention_merge import merge
from lrm_kernels.chunk_attention_tiles import FORWARD, heads_at_once, padded, tiles_for
from lrm_kernels.chunk_groups import group_by_chunk, tile_slots, tile_table


@dataclass(frozen=True)
class Selection:
    """Which query chose which chunk.

    Attributes:
        slots: [S] int32, offsets: [G + 1] int32, from `group_by_chunk`.
        top_k: k.
    """

    slots: Tensor
    offsets: Tensor
    top_k: int

    @classmethod
    def of(cls, indices: Tensor, num_chunks: int) -> Selection:
        """Group the choices [B, T, k]."""
        return cls(*group_by_chunk(indices, num_chunks), indices.shape[2])

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def groups(self) -> int:
        return len(self.offsets) - 1


def base_2_scale(head_dim: int) -> float:
    """What inner products of queries and keys are multiplied with before 2 to their power."""
    return head_dim**-0.5 * math.log2(math.e)


@triton.jit
def _keys_values(k, v, tokens, dims, channels, U: tl.constexpr, STRIDE: tl.constexpr, POLICY: tl.constexpr):
    """Some tokens of a chunk: keys [BLOCK_D, BLOCK_U], as the product with the queries takes them, and values."""
    keys = tl.load(k + tokens[None, :] * STRIDE + dims[:, None],
                   mask=(tokens < U)[None, :] & (dims < channels)[:, None], other=0.0, eviction_policy=POLICY)
    values = tl.load(v + tokens[:, None] * STRIDE + dims[None, :],  # [BLOCK_U, BLOCK_D]
                     mask=(tokens < U)[:, None] & (dims < channels)[None, :], other=0.0, eviction_policy=POLICY)
    return keys, values


@triton.jit(do_not_specialize=["tiles", "groups", "num_slots"], do_not_specialize_on_alignment=["lse"])
def _attend_kernel(
    q, k, v, weights, slots, offsets, tile_group, out, lse, tiles, groups, num_slots, scale,
    H: tl.constexpr, D: tl.constexpr, U: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, BY_ROW: tl.constexpr, WEIGHTS: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    # Heads outermost: the queries of one head, read k times over, are what should stay in the L2 cache.
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group = tl.load(tile_group + tile)
    if group > groups:
        return
    start, stop, _, _ = tile_slots(group, tile, offsets, groups, num_slots, PART)
    # Group number G are the slots without a chunk: nothing is read for them, and so their output is zero.
    asked = tl.where(group < groups, stop, start)  # where the slots with a chunk end
    channels = tl.where(group < groups, D, 0)
    dims, tokens = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_U)
    blocks: tl.constexpr = (U + BLOCK_U - 1) // BLOCK_U
    chunk = (group.to(tl.int64) * U * H + head) * D  # of keys and values
    if blocks == 1:
        # read once: the L2 cache is for the queries and the partial outputs
        keys, values = _keys_values(k + chunk, v + chunk, tokens, dims, channels, U, H * D, "evict_first")
    for begin in range(start, stop, BLOCK_M):
        place = begin + tl.arange(0, BLOCK_M)
        inside = place < stop
        slot = tl.load(slots + place, mask=inside, other=0)
        row = (slot // TOP_K).to(tl.int64)
        slot = slot.to(tl.int64)
        at_row = (row * H + head)[:, None] * D + dims[None, :]
        queries = tl.load(q + at_row,  # [BLOCK_M, BLOCK_D]
                          mask=(place < asked)[:, None] & (dims < channels)[None, :], other=0.0)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        result = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for block in range(blocks):
            if blocks > 1:
                token = block * BLOCK_U + tokens
                keys, values = _keys_values(k + chunk, v + chunk, token, dims, channels, U, H * D, "")
            logits = tl.dot(queries, keys, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_U], of base 2
            if U % BLOCK_U != 0:
                logits = tl.where((block * BLOCK_U + tokens < U)[None, :], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, axis=1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(logits - new_top[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            result = tl.dot(p.to(values.dtype), values, result * shrink[:, None], input_precision="ieee")
            top = new_top
        share = 1.0 / total
        if WEIGHTS:
            share *= tl.load(weights + slot, mask=place < asked, other=0.0).to(tl.float32)
        result *= share[:, None]
        if LSE:
            level = tl.where(place < asked, top + tl.log2(total), float("-inf"))
            tl.store(lse + head * num_slots + (place if WEIGHTS else slot), level, mask=inside)
        to = at_row if BY_ROW else (head * num_slots + slot)[:, None] * D + dims[None, :]
        tl.store(out + to, result.to(out.dtype.element_ty), mask=inside[:, None] & (dims < D)[None, :])


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, table: Tensor, out: Tensor,
    heads: tuple[int, int], *, by_row: bool, weights: Tensor | None = None, lse: Tensor | None = None,
) -> None:  # fmt: skip
    """The output of each chosen chunk by itself, for some of the heads.

    Args:
        queries: [R, H, d]; keys, values: [G, U, H, d], contiguous.
        table: of tiles, for the part of `tiles_for(FORWARD, ...)`.
        out: written: with `by_row` (k must be 1) those heads of [R, H, d], otherwise [h, S, d].
        heads: the first, and how many, h.
        weights: [S], multiplied in; None for ones.
        lse: [h, S] fp32, written: base-2 logarithm of each softmax's denominator, -inf where there is no chunk; in the
            order of the groups where there are weights, of the slots where there are none.
    """
    first, count = heads
    (_, num_heads, head_dim), chunk_size = queries.shape, keys.shape[1]
    cut = tiles_for(FORWARD, queries.dtype, head_dim)
    tiles = len(table)
    _attend_kernel[(tiles * count,)](
        queries[:, first:], keys[:, :, first:], values[:, :, first:], out if weights is None else weights,
        selection.slots, selection.offsets, table, out[:, first:] if by_row else out, out if lse is None else lse,
        tiles, selection.groups, selection.num_slots, base_2_scale(head_dim),
        H=num_heads, D=head_dim, U=chunk_size, TOP_K=selection.top_k, BLOCK_M=cut.queries,
        BLOCK_U=min(cut.tokens, padded(chunk_size)), BLOCK_D=padded(head_dim), PART=cut.part, BY_ROW=by_row,
        WEIGHTS=weights is not None, LSE=lse is not None, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def forward(
    queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, weights: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output and what the backward pass needs beside it.

    Args:
        queries: [R, H, d]; keys, values: [G, U, H, d]; weights: [S] or None. All contiguous.
        with_lse: whether the second result is wanted.

    Returns:
        out: [R, H, d].
        lse: fp32, base-2 logarithms of the softmax denominators: with weights [H, S], one softmax a slot, in the
            order of the groups; without, [H, R], one softmax a query. None if not wanted.
    """
    rows, num_heads, head_dim = queries.shape
    slots, top_k = selection.num_slots, selection.top_k
    cut = tiles_for(FORWARD, queries.dtype, head_dim)
    table = tile_table(selection.offsets, slots, cut.part)
    out = torch.empty_like(queries)
    kept = slots if weights is not None else rows  # softmaxes of a head
    lse = queries.new_empty(num_heads, kept, dtype=torch.float32) if with_lse else None
    if top_k == 1:
        attend(queries, keys, values, selection, table, out, (0, num_heads), by_row=True, weights=weights, lse=lse)
        return out, lse
    at_once = heads_at_once(num_heads, slots * head_dim * queries.element_size())
    partials = queries.new_empty(at_once, slots, head_dim)
    softmax = weights is None
    part_lse = queries.new_empty(at_once, slots, dtype=torch.float32) if softmax else None
    merged_lse = lse
    if softmax and lse is None:
        merged_lse = queries.new_empty(num_heads, rows, dtype=torch.float32)
    for first in range(0, num_heads, at_once):
        count = min(at_once, num_heads - first)
        own = None if merged_lse is None else merged_lse[first : first + count]
        attend(queries, keys, values, selection, table, partials, (first, count), by_row=False, weights=weights,
               lse=part_lse if softmax else own)
        per_row = partials[:count].view(count, rows, top_k, head_dim)  # [h, S, d] -> [h, R, k, d]
        if softmax:
            merge(per_row, out, first, part_lse[:count].view(count, rows, top_k), own)
        else:
            merge(per_row, out, first)
    return out, lse
