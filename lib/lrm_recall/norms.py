"""The gated RMS normalisation at the end of a recurrent mixer, in the two orders that checkpoints use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNormGated(nn.Module):
    """RMSNorm over groups of channels with a SiLU gate, before the gate (GLA) or after it (Mamba2).

    Args:
        size: channels of the weight, the last dimension of the input.
        group_size: channels that share one root mean square; all of them by default.
        eps: added to the mean square.
        norm_before_gate: True for norm(x) * weight * silu(gate), False for norm(x * silu(gate)) * weight.
    """

    def __init__(
        self, size: int, *, group_size: int | None = None, eps: float = 1e-6, norm_before_gate: bool = True
    ) -> None:
        super().__init__()
        self.group_size = size if group_size is None else group_size
        if size % self.group_size:
            raise ValueError(f"group_size must divide the {size} channels of the norm, got {group_size}")
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise and gate x [..., size] with gate [..., size]; computed in fp32, returned in x's dtype."""
        dtype = x.dtype
        compute = torch.promote_types(dtype, torch.float32)
        gate = F.silu(gate.to(compute))
        x = x.to(compute)
        if not self.norm_before_gate:
            x = x * gate
        shape = x.shape
        x = x.unflatten(-1, (-1, self.group_size))  # [..., groups, group_size]
        x = F.rms_norm(x, (self.group_size,), eps=self.eps).view(shape)
        x = x * self.weight.to(compute)
        if self.norm_before_gate:
            x = x * gate
        return x.to(dtype)
