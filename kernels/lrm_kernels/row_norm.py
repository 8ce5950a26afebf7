"""RMS norms of a few short rows, for decoding: the libraries' kernels are laid out for thousands.

M rows, D channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 256


def row_norm_reference(
    x: Tensor, weight: Tensor, eps: float, *, gate: Tensor | None = None, gate_first: bool = False,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `row_norm` computes, in plain torch."""
    y = x.float() if residual is None else x.float() + residual.float()
    if gate is not None and gate_first:
        y = y * F.silu(gate.float())
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    if gate is not None and not gate_first:
        y = y * F.silu(gate.float())
    return y.to(x.dtype)


@triton.jit
def _row_norm_kernel(
    x, weight, gate, residual, total, y, eps, stride_gate, GATES_PER_ROW: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, GATE_FIRST: tl.constexpr, ADD: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    value = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * D + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * D + at, value.to(total.dtype.element_ty), mask=inside)
    if GATE:
        place = gate + (row // GATES_PER_ROW) * stride_gate + (row % GATES_PER_ROW) * D + at
        g = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        g = g * tl.sigmoid(g)
        if GATE_FIRST:
            value *= g
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    value *= tl.load(weight + (row % GROUPS) * D + at, mask=inside, other=0.0).to(tl.float32)
    if GATE and not GATE_FIRST:
        value *= g
    tl.store(y + row * D + at, value.to(y.dtype.element_ty), mask=inside)


def row_norm(
    x: Tensor, weight: Tensor, eps: float, *, gate: Tensor | None = None, gate_first: bool = False,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """RMS norm over the last dimension of a few rows, with what stands before or behind it.

    Args:
        x: [..., D], contiguous, at most MOST_ROWS rows.
        weight: [D], or [groups * D] for rows that take turns in its groups.
        gate: [..., D] of the same shape, rows at one distance from each other: silu(gate) multiplies the result, or
            with `gate_first` the input.
        residual: [..., D], contiguous: it is added to the input, and the sum is returned too, in the residual's dtype.

    Returns:
        y [..., D] in x's dtype; with a residual, y and the sum.

    Raises:
        ValueError: too many rows.
    """
    D = x.shape[-1]
    rows = x.numel() // D
    if rows > MOST_ROWS:
        raise ValueError(f"row_norm takes at most {MOST_ROWS} rows, got {rows}")
    y = torch.empty_like(x)
    total = y if residual is None else torch.empty_like(residual)
    per_row = 1 if gate is None else gate[0, 0].numel() // D  # [B, 1, ...]: heads of a token lie side by side
    _row_norm_kernel[(rows,)](
        x, weight, x if gate is None else gate, x if residual is None else residual, total, y, eps,
        0 if gate is None else gate.stride(0), GATES_PER_ROW=per_row, D=D, BLOCK=triton.next_power_of_2(D),
        GATE=gate is not None, GATE_FIRST=gate_first, ADD=residual is not None, GROUPS=weight.numel() // D,
        num_warps=min(16, max(1, triton.next_power_of_2(D) // 256)),
    )  # fmt: skip
    return y if residual is None else (y, total)
