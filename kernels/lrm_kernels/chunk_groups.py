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
_SEARCHES = 128  # numbers looked up in one program, each step of which waits for memory
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
    keys, order = keys.sort(stable=True)
    slots, offsets = (torch.empty(size, dtype=torch.int32, device=indices.device) for size in (num_slots, groups + 1))
    _offsets_kernel[(triton.cdiv(max(num_slots, groups + 1), _SEARCHES),)](
        keys, order, slots, offsets, num_slots, groups, num_slots.bit_length(), BLOCK=_SEARCHES
    )
    return slots, offsets


@triton.jit(do_not_specialize=["num_slots", "groups", "steps"])
def _offsets_kernel(keys, order, slots, offsets, num_slots, groups, steps, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_slots
    tl.store(slots + place, tl.load(order + place, mask=inside, other=0).to(tl.int32), mask=inside)
    low = tl.zeros([BLOCK], dtype=tl.int32)  # `place` is a group too: its first slot lies from low to high
    high = low + num_slots
    for _ in range(steps):
        middle = low + (high - low) // 2
        open_ = (low < high) & (place <= groups)
        after = tl.load(keys + middle, mask=open_, other=0) < place
        low = tl.where(open_ & after, middle + 1, low)
        high = tl.where(open_ & (after == 0), middle, high)
    tl.store(offsets + place, low, mask=place <= groups)


@triton.jit(do_not_specialize=["tiles", "groups", "num_slots", "steps"])
def _table_kernel(offsets, tile_group, tiles, groups, num_slots, steps, PART: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], dtype=tl.int32)  # the first group that begins behind the tile lies from low to high
    high = low + groups + 1
    for _ in range(steps):
        middle = low + (high - low) // 2
        open_ = (low < high) & (tile < tiles)
        before = _first_tile(middle, tl.load(offsets + middle, mask=open_, other=0), PART) <= tile
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
    group = tl.maximum(low - 1, 0)
    first = tl.load(offsets + group, mask=tile < tiles, other=0)
    last = tl.load(offsets + group + 1, mask=(tile < tiles) & (group < groups), other=num_slots)
    extra = tile - _first_tile(group, first, PART)
    taken = (extra == 0) | (first + extra * PART < last)
    tl.store(tile_group + tile, tl.where(taken, group, groups + 1), mask=tile < tiles)


@triton.jit
def _first_tile(group, first, PART: tl.constexpr):
    """The tile at which a group begins whose slots begin at `first`.

    So far apart that no count of tiles is needed: with n tiles a group ends before `first + n * PART`, so the next one
    begins at n tiles further, or at n + 1.
    """
    return group + first // PART


def tile_table(offsets: Tensor, num_slots: int, part: int) -> Tensor:
    """Which group each tile belongs to. Every group has a tile, an empty one too, and the slots without a chunk are
    one more group, number G: somebody has to write their zeros.

    Args:
        offsets: [G + 1] int32, from `group_by_chunk`.
        num_slots: S.
        part: most slots in a tile.

    Returns:
        [G + 1 + S // part] int32, the group of each tile, in ascending order but for the tiles too many, whose number
        is G + 1.
    """
    groups, tiles = len(offsets) - 1, len(offsets) + num_slots // part
    tile_group = torch.empty(tiles, dtype=torch.int32, device=offsets.device)
    _table_kernel[(triton.cdiv(tiles, _SEARCHES),)](
        offsets, tile_group, tiles, groups, num_slots, len(offsets).bit_length(), PART=part, BLOCK=_SEARCHES
    )
    return tile_group


@triton.jit
def tile_slots(group, tile, offsets, groups, num_slots, PART: tl.constexpr):
    """Where a tile of a group begins and ends in the list of slots, and where its group does."""
    first = tl.load(offsets + group)
    last = tl.load(offsets + group + 1, mask=group < groups, other=num_slots)
    start = first + (tile - _first_tile(group, first, PART)) * PART
    return start, tl.minimum(start + PART, last), first, last
