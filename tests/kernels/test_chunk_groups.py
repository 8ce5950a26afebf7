"""Choices turned round: which slots a chunk has, and which programs take them."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_kernels.chunk_groups import group_by_chunk, tile_slots, tile_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def choices(draw):
    """Indices [B, T, k], some of them no chunk, and N."""
    B, T, k, N = (draw(st.integers(1, most)) for most in (3, 12, 4, 6))
    numbers = draw(st.lists(st.integers(-2, N), min_size=B * T * k, max_size=B * T * k))
    return torch.tensor(numbers, device=DEVICE).view(B, T, k), N


@settings(max_examples=60, deadline=None)
@given(choices())
def test_every_slot_once_with_its_chunk_and_in_order(case):
    indices, N = case
    slots, offsets = group_by_chunk(indices, N)
    assert slots.dtype == offsets.dtype == torch.int32 and len(offsets) == len(indices) * N + 1
    flat, per_row = indices.flatten().tolist(), indices[0].numel()
    for g in range(len(offsets) - 1):
        expected = [s for s, n in enumerate(flat) if s // per_row == g // N and n == g % N]
        assert slots[offsets[g] : offsets[g + 1]].tolist() == expected
    assert slots[offsets[-1] :].tolist() == [s for s, n in enumerate(flat) if not 0 <= n < N]


@settings(max_examples=60, deadline=None)
@given(choices(), st.integers(1, 9))
def test_tiles_cover_every_group_and_are_never_too_few(case, part):
    indices, N = case
    slots, offsets = group_by_chunk(indices, N)
    groups = len(offsets) - 1
    table = tile_table(offsets, len(slots), part)
    ends = [*offsets.tolist(), len(slots)]
    expected = [g for g in range(groups + 1) for _ in range(max(1, -(-(ends[g + 1] - ends[g]) // part)))]
    assert len(table) == groups + 1 + len(slots) // part
    assert [g for g in table.tolist() if g <= groups] == expected
    assert table[table > groups].eq(groups + 1).all()


@triton.jit
def _mark_kernel(table, offsets, marks, groups, num_slots, PART: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.load(table + tl.program_id(0))
    if group <= groups:
        start, stop, _, _ = tile_slots(group, tl.program_id(0), offsets, groups, num_slots, PART)
        place = start + tl.arange(0, BLOCK)
        marked = tl.load(marks + place, mask=place < stop, other=0)
        tl.store(marks + place, marked + group * 1000 + 1, mask=place < stop)


@settings(max_examples=30, deadline=None)
@given(choices(), st.integers(1, 9))
def test_every_slot_lies_in_one_tile_of_its_group(case, part):
    indices, N = case
    slots, offsets = group_by_chunk(indices, N)
    table, groups, num_slots = tile_table(offsets, len(slots), part), len(offsets) - 1, len(slots)
    marks = torch.zeros_like(slots)
    _mark_kernel[(len(table),)](table, offsets, marks, groups, num_slots, PART=part, BLOCK=16)
    sizes = torch.tensor([*offsets.tolist(), num_slots]).diff()
    expected = torch.arange(groups + 1).repeat_interleave(sizes) * 1000 + 1
    assert marks.tolist() == expected.tolist()


def test_more_chunks_than_int16_counts():
    N = 40_000
    indices = torch.tensor([[[N - 1, 0], [-1, 39_000], [N - 1, N]]], device=DEVICE)
    slots, offsets = group_by_chunk(indices, N)
    assert slots.tolist() == [1, 3, 0, 4, 2, 5]
    assert offsets[[0, 1, 39_000, 39_001, N - 1, N]].tolist() == [0, 1, 1, 2, 2, 4]


def test_more_than_int32_counts_is_refused():
    with pytest.raises(ValueError, match="at most 2147483647 choices and chunks can be grouped, got 2147483648"):
        group_by_chunk(torch.zeros(1, device="meta").expand(2**11, 2**10, 2**10), 4)
