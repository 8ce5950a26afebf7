"""Which queries chose a chunk: the choices turned round, on the device and without waiting for it.

Symbols
    B  batch    T  query positions    k  chunks a query    N  chunks of a batch row
    G  groups: the B N chunks, number b N + n
    S  slots: the B T k choices, number (b T + t) k + j
A program of an attention kernel takes a *tile*: up to `part` queries of one group. How many tiles a group has is known
on the device alone, so as many are launched as there can be, and those too many find no group and stop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # slots in one program
_MOST = 2**31 - 1  # slots and groups are counted in int32


@triton.jit(do_not_specialize=["num_slots", "slots_per_row", "num_chunks", "groups"])
def _key_kernel(indices, keys, num_slots, slots_per_row, num_chunks, groups, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    chunk = tl.load(indices + slot, mask=inside, other=-1)
    key = tl.where((chunk >= 0) & (chunk < num_chunks), slot // slots_per_row * num_chunks + chunk, groups)
    tl.store(keys + slot, key.to(keys.dtype.element_ty), mask=inside)


def group_by_chunk(indices: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """The slots in the order of their chunks: group g is `slots[offsets[g] : offsets[g + 1]]`, in ascending order.

    Args:
        indices: [B, T, k] int64; a number outside 0 to num_chunks - 1, such as -1, is no chunk.
        num_chunks: N.

    Returns:
        slots: [S] int32; those with no chunk come last, from offsets[G] on.
        offsets: [G + 1] int32.

    Raises:
        ValueError: more slots or chunks than int32 counts.
    """
    batch, length, top_k = indices.shape
    num_slots, groups = indices.numel(), batch * num_chunks
    if max(num_slots, groups) > _MOST:
        raise ValueError(f"at most {_MOST} choices and chunks can be grouped, got {num_slots} and {groups}")
    dtype = torch.int16 if groups < 2**15 else torch.int32  # the radix sort takes half as many passes over int16
    keys = torch.empty(num_slots, dtype=dtype, device=indices.device)
    if num_slots:
        _key_kernel[(triton.cdiv(num_slots, _BLOCK),)](
            indices.contiguous(), keys, num_slots, length * top_k, num_chunks, groups, BLOCK=_BLOCK
        )
    keys, slots = keys.sort(stable=True)
    number = torch.arange(groups + 1, dtype=dtype, device=indices.device)
    return slots.to(torch.int32), torch.searchsorted(keys, number, out_int32=True)


@triton.jit(do_not_specialize=["groups", "num_slots"])
def _count_kernel(offsets, tiles, groups, num_slots, PART: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(offsets + group, mask=group <= groups, other=0)
    last = tl.load(offsets + group + 1, mask=group < groups, other=num_slots)
    tl.store(tiles + group, tl.maximum((last - first + PART - 1) // PART, 1), mask=group <= groups)


def tile_table(offsets: Tensor, num_slots: int, part: int) -> tuple[Tensor, Tensor]:
    """Which group each tile belongs to. Every group has a tile, an empty one too, and the slots without a chunk are
    one more group, number G: somebody has to write their zeros.

    Args:
        offsets: [G + 1] int32, from `group_by_chunk`.
        num_slots: S.
        part: most slots in a tile.

    Returns:
        tile_group: [G + 1 + S // part] int32, the group of each tile in ascending order; G + 1 for a tile too many.
        tile_ends: [G + 1] int32, one more than the last tile of each group.
    """
    groups = len(offsets) - 1
    tiles = torch.empty_like(offsets)
    _count_kernel[(triton.cdiv(groups + 1, _BLOCK),)](offsets, tiles, groups, num_slots, PART=part, BLOCK=_BLOCK)
    ends = tiles.cumsum(0, dtype=torch.int32)
    number = torch.arange(groups + 1 + num_slots // part, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(ends, number, right=True, out_int32=True), ends


@triton.jit
def tile_slots(group, tile, tile_ends, offsets, groups, num_slots, PART: tl.constexpr):
    """Where a tile of a group begins and ends in the list of slots, and where its group does."""
    first = tl.load(offsets + group)
    last = tl.load(offsets + group + 1, mask=group < groups, other=num_slots)
    start = first + (tile - tl.load(tile_ends + group - 1, mask=group > 0, other=0)) * PART
    return start, tl.minimum(start + PART, last), first, last
