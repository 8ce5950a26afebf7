"""One token of a causal depthwise convolution, its window of inputs moved on in place.

B batch, D channels, W taps
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256  # channels in one program


def conv_step_reference(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """What `conv_step` computes, in plain torch: y [B, D], and the new window."""
    inputs = torch.cat((window, x.unsqueeze(1).to(window.dtype)), dim=1)  # [B, W, D]
    y = (inputs.float() * weight.float().T).sum(1)  # [B, D]
    y = y if bias is None else y + bias.float()
    return (F.silu(y) if silu else y).to(x.dtype), inputs[:, 1:]


@triton.jit
def _conv_step_kernel(
    x, window, weight, bias, y, stride_x,
    D, W: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = channels < D
    place = window + row * (W - 1) * D + channels
    new = tl.load(x + row * stride_x + channels, mask=inside, other=0.0)
    total = new.to(tl.float32) * tl.load(weight + channels * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(W - 1):
        old = tl.load(place + tap * D, mask=inside, other=0.0)
        total += old.to(tl.float32) * tl.load(weight + channels * W + tap, mask=inside, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(place + (tap - 1) * D, old, mask=inside)
    if W > 1:
        tl.store(place + (W - 2) * D, new.to(window.dtype.element_ty), mask=inside)
    if BIAS:
        total += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + row * D + channels, total.to(y.dtype.element_ty), mask=inside)


def conv_step(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False
) -> Tensor:
    """One token; the window is changed in place.

    Args:
        x: [B, D], its last dimension contiguous.
        window: [B, W - 1, D] contiguous, the inputs before x.
        weight: [D, W] contiguous, the last tap on x itself.
        bias: [D].
        silu: apply it to the result.

    Returns:
        y [B, D] in x's dtype.

    Raises:
        ValueError: the window or the weight is not contiguous.
    """
    (B, D), W = x.shape, weight.shape[1]
    if not window.is_contiguous() or not weight.is_contiguous():
        raise ValueError("the window and the weight must be contiguous")
    y = x.new_empty(B, D)
    _conv_step_kernel[(triton.cdiv(D, _BLOCK), B)](
        x, window, weight, x if bias is None else bias, y, x.stride(0), D,
        W=W, BLOCK=_BLOCK, BIAS=bias is not None, SILU=silu, num_warps=4,
    )  # fmt: skip
    return y
