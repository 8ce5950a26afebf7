"""Programs that add up what each found for the same few columns, in order: the same sum in every run, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PARTS = 256  # programs that a sum over all rows is spread over, about two for each processor of a GPU

_ROWS, _COLUMNS = 32, 64  # of the parts in one step of a program


@triton.jit(do_not_specialize=["parts", "D"])
def _column_sums_kernel(x, y, parts, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, parts, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        total += tl.load(x + row[:, None] * D + columns[None, :],
                         mask=(row < parts)[:, None] & (columns < D)[None, :], other=0.0)
    tl.store(y + columns, tl.sum(total, axis=0).to(y.dtype.element_ty), mask=columns < D)


def column_sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of parts [P, D] fp32 over P, as [D] in `dtype`, in one launch."""
    count, D = parts.shape
    sums = parts.new_empty(D, dtype=dtype)
    _column_sums_kernel[(triton.cdiv(D, _COLUMNS),)](
        parts, sums, count, D, ROWS=_ROWS, BLOCK=_COLUMNS, num_warps=4
    )  # fmt: skip
    return sums
