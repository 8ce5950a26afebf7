"""Backward pass of `chunk_attention`: a program holds a block of one chunk of one head and runs over its queries.

Symbols
    as in chunk_attention_forward.py
    p   probabilities of a softmax     dp  their gradients, V dO^T
    ds  gradients of the logits: w p (dp - delta), delta = sum p dp over the softmax, w the slot's weight or 1
Gradients of keys and values are summed where the program holds them, with no atomics: the result is the same in every
run. Only a chunk with more than `part` queries is shared by several programs; they write fp32 sums that
`_sum_parts_kernel` adds. The gradients of the queries are partial results, merged as the outputs are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrm_kernels.chunk_attention_forward import Selection, attend, base_2_scale
from lrm_kernels.chunk_attention_merge import merge, row_dot
from lrm_kernels.chunk_attention_tiles import BACKWARD, FORWARD, heads_at_once, padded, tiles_for
from lrm_kernels.chunk_groups import tile_slots, tile_table

_SUM_ROWS = 16  # tokens in one program of `_sum_parts_kernel`
_SUM_SLOTS = 256  # slots in one program of `_sum_heads_kernel`


@triton.jit(
    do_not_specialize=["tiles", "groups", "num_slots", "rows", "parts"], do_not_specialize_on_alignment=["lse", "delta"]
)
def _attend_backward_kernel(
    q, k, v, weights, d_out, slots, offsets, tile_group, lse, delta, d_q, d_k, d_v, part_d_k, part_d_v,
    tiles, groups, num_slots, rows, parts, scale, scale_2,
    H: tl.constexpr, D: tl.constexpr, U: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, BY_ROW: tl.constexpr, WEIGHTS: tl.constexpr,
    LOCAL_DELTA: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (U + BLOCK_U - 1) // BLOCK_U
    block = tl.program_id(0) // tiles % blocks
    head = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    tile = tl.program_id(0) % tiles
    group = tl.load(tile_group + tile)
    if group > groups:
        return
    start, stop, first, last = tile_slots(group, tile, offsets, groups, num_slots, PART)
    asked = tl.where(group < groups, stop, start)  # as in the forward pass
    channels = tl.where(group < groups, D, 0)
    dims = tl.arange(0, BLOCK_D)
    tokens = block * BLOCK_U + tl.arange(0, BLOCK_U)
    here = (tokens < U)[:, None] & (dims < channels)[None, :]
    at_token = ((group.to(tl.int64) * U + tokens) * H + head)[:, None] * D + dims[None, :]
    keys = tl.load(k + at_token, mask=here, other=0.0, eviction_policy="evict_first")  # [BLOCK_U, BLOCK_D]
    values = tl.load(v + at_token, mask=here, other=0.0, eviction_policy="evict_first")
    d_keys = tl.zeros([BLOCK_U, BLOCK_D], dtype=tl.float32)
    d_values = tl.zeros([BLOCK_U, BLOCK_D], dtype=tl.float32)
    for begin in range(start, stop, BLOCK_M):
        place = begin + tl.arange(0, BLOCK_M)
        inside = place < stop
        slot = tl.load(slots + place, mask=inside, other=0)
        row = (slot // TOP_K).to(tl.int64)
        slot = slot.to(tl.int64)
        queried = place < asked
        wanted = queried[:, None] & (dims < channels)[None, :]
        softmax = head * num_slots + place if WEIGHTS else head * rows + row  # with weights each slot has its own
        at_row = (row * H + head)[:, None] * D + dims[None, :]
        queries = tl.load(q + at_row, mask=wanted, other=0.0)  # [BLOCK_M, BLOCK_D]
        d_outputs = tl.load(d_out + at_row, mask=wanted, other=0.0)
        level = tl.load(lse + softmax, mask=queried, other=float("inf"))  # no probability where nobody asked
        logits = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale_2  # [BLOCK_U, BLOCK_M]
        if U % BLOCK_U != 0:
            logits = tl.where((tokens < U)[:, None], logits, float("-inf"))
        p = tl.exp2(logits - level[None, :])
        dp = tl.dot(values, tl.trans(d_outputs), input_precision="ieee")
        if LOCAL_DELTA:  # the program sees the whole softmax
            change = tl.sum(p * dp, axis=0)
            tl.store(delta + softmax, change, mask=inside)
        else:
            change = tl.load(delta + softmax, mask=queried, other=0.0)
        if WEIGHTS:
            p *= tl.load(weights + slot, mask=queried, other=0.0).to(tl.float32)[None, :]
        d_values = tl.dot(p.to(values.dtype), d_outputs, d_values, input_precision="ieee")
        ds = (p * (dp - change[None, :])).to(keys.dtype)
        d_keys = tl.dot(ds, queries, d_keys, input_precision="ieee")
        d_queries = tl.dot(tl.trans(ds), keys, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_D]
        to = at_row if BY_ROW else ((head * num_slots + slot) * blocks + block)[:, None] * D + dims[None, :]
        tl.store(d_q + to, d_queries.to(d_q.dtype.element_ty), mask=inside[:, None] & (dims < D)[None, :])
    d_keys *= scale
    if last - first <= PART:
        tl.store(d_k + at_token, d_keys.to(d_k.dtype.element_ty), mask=here)
        tl.store(d_v + at_token, d_values.to(d_v.dtype.element_ty), mask=here)
    else:
        entry = _entry(start, last, PART)
        at_part = ((head * parts + entry) * U + tokens)[:, None] * D + dims[None, :]
        tl.store(part_d_k + at_part, d_keys, mask=here)
        tl.store(part_d_v + at_part, d_values, mask=here)


@triton.jit
def _entry(start, last, PART: tl.constexpr):
    """Where a tile that shares its chunk writes its sums; `last` is where its group ends.

    Full tiles of all groups begin PART slots or more apart, and so do the last tiles of groups of more than PART.
    """
    return start // PART * 2 + (start + PART >= last).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots"])
def _sum_heads_kernel(delta, slots, d_weights, num_slots, H: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_slots
    total = tl.zeros([BLOCK], dtype=tl.float32)
    at = delta + place
    for _ in range(H):
        total += tl.load(at, mask=inside, other=0.0)
        at += num_slots
    slot = tl.load(slots + place, mask=inside, other=0)
    tl.store(d_weights + slot, total.to(d_weights.dtype.element_ty), mask=inside)


def _sum_heads(delta: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the weights [S]: delta [H, S], in the order of the groups, over the heads."""
    d_weights = torch.empty_like(weights)
    num_heads, num_slots = delta.shape
    _sum_heads_kernel[(triton.cdiv(num_slots, _SUM_SLOTS),)](
        delta, slots, d_weights, num_slots, H=num_heads, BLOCK=_SUM_SLOTS, num_warps=4
    )  # fmt: skip
    return d_weights


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(
    offsets, part_d_k, part_d_v, d_k, d_v, parts, H: tl.constexpr, D: tl.constexpr, U: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    first, last = tl.load(offsets + group), tl.load(offsets + group + 1)
    if last - first <= PART:
        return
    head = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    here = (tokens < U)[:, None] & (dims < D)[None, :]
    d_keys = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    d_values = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for start in range(first, last, PART):
        at = ((head * parts + _entry(start, last, PART)) * U + tokens)[:, None] * D + dims[None, :]
        d_keys += tl.load(part_d_k + at, mask=here, other=0.0)
        d_values += tl.load(part_d_v + at, mask=here, other=0.0)
    to = ((group.to(tl.int64) * U + tokens) * H + head)[:, None] * D + dims[None, :]
    tl.store(d_k + to, d_keys.to(d_k.dtype.element_ty), mask=here)
    tl.store(d_v + to, d_values.to(d_v.dtype.element_ty), mask=here)


def backward(
    d_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, weights: Tensor | None,
    out: Tensor | None, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of queries, keys, values and weights, each of its input's shape and dtype.

    Args:
        d_out: [R, H, d], contiguous.
        queries, keys, values, selection, weights: as for `forward`.
        out, lse: what `forward` returned; `out` is needed without weights only.
    """
    (rows, num_heads, head_dim), (groups, chunk_size) = queries.shape, keys.shape[:2]
    slots = selection.num_slots
    cut = tiles_for(BACKWARD, queries.dtype, head_dim)
    block_u = min(cut.tokens, padded(chunk_size))
    blocks = triton.cdiv(chunk_size, block_u)
    by_row = selection.top_k * blocks == 1
    bytes_per_head = slots * blocks * head_dim * queries.element_size()
    at_once = num_heads if by_row else heads_at_once(num_heads, bytes_per_head)
    table = tile_table(selection.offsets, slots, cut.part)

    delta = torch.empty_like(lse)
    local_delta = weights is not None and blocks == 1
    if weights is None:
        row_dot(out.transpose(0, 1), d_out, delta, 0)
    elif not local_delta:
        _delta_of_chunks(d_out, queries, keys, values, selection, delta)

    d_queries, d_keys, d_values = (torch.empty_like(x) for x in (queries, keys, values))
    partials = d_queries if by_row else queries.new_empty(at_once, slots, blocks, head_dim)
    parts = 2 * triton.cdiv(slots, cut.part) if slots > cut.part else 0  # no chunk has more queries than there are
    shared = queries.new_empty(2, at_once, parts, chunk_size, head_dim, dtype=torch.float32)
    for first in range(0, num_heads, at_once):
        count = min(at_once, num_heads - first)
        own = slice(first, first + count)
        _attend_backward_kernel[(len(table) * blocks * count,)](
            queries[:, first:], keys[:, :, first:], values[:, :, first:], delta if weights is None else weights,
            d_out[:, first:], selection.slots, selection.offsets, table, lse[own], delta[own], partials,
            d_keys[:, :, first:], d_values[:, :, first:], *shared, len(table), groups, slots, rows, parts,
            head_dim**-0.5, base_2_scale(head_dim), H=num_heads, D=head_dim, U=chunk_size, TOP_K=selection.top_k,
            BLOCK_M=cut.queries, BLOCK_U=block_u, BLOCK_D=padded(head_dim), PART=cut.part, BY_ROW=by_row,
            WEIGHTS=weights is not None, LOCAL_DELTA=local_delta, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        if parts:
            _sum_parts_kernel[(groups, count, triton.cdiv(chunk_size, _SUM_ROWS))](
                selection.offsets, *shared, d_keys[:, :, first:], d_values[:, :, first:], parts,
                H=num_heads, D=head_dim, U=chunk_size, ROWS=_SUM_ROWS, BLOCK_D=padded(head_dim), PART=cut.part,
                num_warps=4,
            )  # fmt: skip
        if not by_row:
            merge(partials[:count].view(count, rows, -1, head_dim), d_queries, first)
    return d_queries, d_keys, d_values, None if weights is None else _sum_heads(delta, selection.slots, weights)


def _delta_of_chunks(
    d_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, selection: Selection, delta: Tensor
) -> None:
    """delta of each slot's own softmax: the product of its unweighted output, computed again, with d_out.

    Only for chunks that a program of the backward pass does not hold whole. `delta` [H, S] is written, in the order of
    the groups.
    """
    num_heads, head_dim = queries.shape[1:]
    slots = selection.num_slots
    at_once = heads_at_once(num_heads, slots * head_dim * queries.element_size())
    table = tile_table(selection.offsets, slots, tiles_for(FORWARD, queries.dtype, head_dim).part)
    outputs = queries.new_empty(at_once, slots, head_dim)
    products = delta.new_empty(at_once, slots)
    for first in range(0, num_heads, at_once):
        count = min(at_once, num_heads - first)
        attend(queries, keys, values, selection, table, outputs, (first, count), by_row=False)
        row_dot(outputs[:count], d_out, products[:count], first)
        torch.index_select(products[:count], 1, selection.slots, out=delta[first : first + count])
