"""The normalisations of blocks and mixers, with the parameter names that checkpoints use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrm_recall.ops.norm import add_rms_norm, gated_rms_norm, layer_norm, rms_norm, rms_norm_of_gated

__all__ = ["LayerNorm", "RMSNorm", "RMSNormGated"]


class RMSNorm(nn.Module):
    """x over the root of its mean square, times a weight.

    Args:
        size: D, channels of the weight, the last dimension of the input.
        eps: added to the mean square.
    """

    def __init__(self, size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D]; computed in fp32, returned in x's dtype."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Add x [..., D] to the residual stream; the norm of the sum in x's dtype, and the sum in the stream's."""
        return add_rms_norm(x, stream, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, behind a residual connection too."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D]; computed in fp32, returned in x's dtype."""
        return layer_norm(x.to(self.weight.dtype), self.weight, self.bias, self.eps).to(x.dtype)

    def add(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Add x [..., D] to the residual stream; the norm of the sum in x's dtype, and the sum in the stream's."""
        stream = stream + x
        return self(stream).to(x.dtype), stream


class RMSNormGated(nn.Module):
    """RMSNorm over groups of channels with a SiLU gate, before the gate (GLA) or after it (Mamba2).

    Args:
        size: channels of the weight, the last dimension of the input.
        group_size: channels that share one root mean square; all of them by default. Groups smaller than `size` are
            for the norm after the gate.
        eps: added to the mean square.
        norm_before_gate: True for norm(x) * weight * silu(gate), False for norm(x * silu(gate)) * weight.

    Raises:
        ValueError: group_size does not divide the channels, or groups were asked for before the gate.
    """

    def __init__(
        self, size: int, *, group_size: int | None = None, eps: float = 1e-6, norm_before_gate: bool = True
    ) -> None:
        super().__init__()
        self.group_size = size if group_size is None else group_size
        if size % self.group_size or (norm_before_gate and self.group_size != size):
            raise ValueError(f"group_size must divide the {size} channels of the norm, and be all of them in a norm "
                             f"before the gate, got {group_size}")
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalise and gate x [..., size] with gate [..., size]; computed in fp32, returned in x's dtype."""
        if self.norm_before_gate:
            return gated_rms_norm(x, gate, self.weight, self.eps)
        return rms_norm_of_gated(x, gate, self.weight, self.eps, self.group_size)
