"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2): channel i is rotated against channel i + K/2.

B batch, T tokens, H heads, K channels per head, an even number
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrm_recall.ops.dispatch import dispatched


def cos_sin(positions: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles that turn each position.

    Args:
        positions: [1 or B, T] integers.
        head_dim: K.
        theta: base of the wavelengths.

    Returns:
        two [1 or B, T, K/2] fp32.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device) / head_dim  # [K/2]
    angle = positions.float().unsqueeze(-1) * theta**-exponent  # [1 or B, T, K/2]
    return angle.cos(), angle.sin()


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, K] by the angles of `cos_sin`; computed in fp32, returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)  # [B, T, H, K/2] each
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [1 or B, T, 1, K/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


rotate = dispatched("rotate", rotate_torch)
