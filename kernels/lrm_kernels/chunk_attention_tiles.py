"""How `chunk_attention` is cut into programs: a few constants, which bench/gpu_chunk_attention.py --sweep varies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

MOST_CHANNELS = 256  # of a head
SCRATCH_BYTES = 256 << 20  # what the heads that are computed at a time may write for the merge; at least one head is


@dataclass(frozen=True)
class Tiles:
    """One way to cut.

    Attributes:
        queries: rows of queries in one product, a power of two from 16 on.
        tokens: most tokens of a chunk that are held at once, likewise; a longer chunk is taken in blocks.
        part: most queries in one program, which loops over them `queries` at a time.
        warps, stages: as Triton means them.
    """

    queries: int
    tokens: int
    part: int
    warps: int
    stages: int


# by bytes of an element and channels of a head, rounded up to a power of two
FORWARD = {
    (2, 64): Tiles(queries=64, tokens=64, part=512, warps=4, stages=3),
    (2, 128): Tiles(queries=64, tokens=64, part=256, warps=4, stages=2),
    (2, 256): Tiles(queries=64, tokens=64, part=512, warps=8, stages=2),
    (4, 64): Tiles(queries=32, tokens=32, part=256, warps=4, stages=1),
    (4, 128): Tiles(queries=32, tokens=32, part=256, warps=8, stages=1),
    (4, 256): Tiles(queries=32, tokens=16, part=256, warps=8, stages=1),
}
BACKWARD = {
    (2, 64): Tiles(queries=64, tokens=64, part=1024, warps=4, stages=2),
    (2, 128): Tiles(queries=64, tokens=64, part=4096, warps=4, stages=2),
    (2, 256): Tiles(queries=32, tokens=64, part=1024, warps=8, stages=2),
    (4, 64): Tiles(queries=32, tokens=32, part=256, warps=4, stages=1),
    (4, 128): Tiles(queries=16, tokens=32, part=256, warps=4, stages=1),
    (4, 256): Tiles(queries=16, tokens=16, part=256, warps=8, stages=1),
}


def tiles_for(table: dict[tuple[int, int], Tiles], dtype: torch.dtype, head_dim: int) -> Tiles:
    """The entry of FORWARD or BACKWARD for a dtype and a head_dim of at most MOST_CHANNELS."""
    return table[dtype.itemsize, max(64, triton.next_power_of_2(head_dim))]


def padded(size: int) -> int:
    """A size as tensor cores take it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def heads_at_once(num_heads: int, bytes_per_head: int) -> int:
    """How many heads to compute before their partial results are merged, in groups of nearly one size."""
    most = max(1, min(num_heads, SCRATCH_BYTES // bytes_per_head))
    return triton.cdiv(num_heads, triton.cdiv(num_heads, most))
