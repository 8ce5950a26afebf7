"""Normalisations, each alone and fused with what stands beside it in a block.

All are computed in fp32 (fp64 for fp64) and returned in x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.ops.dispatch import dispatched


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over the root of its mean square, times weight [D]."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., D] less its mean, over its standard deviation, times weight [D] plus bias [D]; all of one dtype."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_rms_norm_torch(x: Tensor, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual connection and the norm behind it.

    Args:
        x: [..., D], what a branch adds.
        stream: [..., D], the residual stream, in any dtype; the sum keeps it.
        weight: [D].

    Returns:
        the norm of the sum, in x's dtype, and the sum.
    """
    stream = stream + x
    return rms_norm_torch(stream, weight, eps).to(x.dtype), stream


def gated_rms_norm_torch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """norm(x) * weight * silu(gate), over the last dimension (GLA): x and gate [..., V], weight [V]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(compute), (x.shape[-1],), weight.to(compute), eps)
    return (y * F.silu(gate.to(compute))).to(x.dtype)


def rms_norm_of_gated_torch(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """norm(x * silu(gate)) * weight, over groups of channels (Mamba2): x and gate [..., E], weight [E]."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(compute) * F.silu(gate.to(compute))).unflatten(-1, (-1, group_size))  # [..., groups, group_size]
    y = F.rms_norm(y, (group_size,), eps=eps).flatten(-2)  # [..., E]
    return (y * weight.to(compute)).to(x.dtype)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., K] to unit length: x / sqrt(sum of x^2 + eps)."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


rms_norm = dispatched("rms_norm", rms_norm_torch)
layer_norm = dispatched("layer_norm", layer_norm_torch)
add_rms_norm = dispatched("add_rms_norm", add_rms_norm_torch)
gated_rms_norm = dispatched("gated_rms_norm", gated_rms_norm_torch)
rms_norm_of_gated = dispatched("rms_norm_of_gated", rms_norm_of_gated_torch)
