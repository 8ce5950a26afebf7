"""Causal multi-head softmax attention with rotary positions: the Transformer that recurrent models are held against.

B batch, T new tokens, P tokens in the cache, D hidden size, H heads, K channels per head
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer


class Attention(Mixer):
    """Multi-head attention.

    Args:
        hidden_size: D.
        num_heads: H.
        rotary: rotate queries and keys by their position (RoFormer, arXiv 2104.09864, section 3.2), counted from each
            row's first real token; without it the layer knows no order but causality.
        rope_theta: base of the rotation's wavelengths.

    Raises:
        ValueError: the heads do not divide the hidden size, or leave an odd number of channels to rotate.
    """

    def __init__(
        self, hidden_size: int, *, num_heads: int = 4, rotary: bool = True, rope_theta: float = 10000.0
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size: got num_heads={num_heads}, hidden_size={hidden_size}")
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, hidden_size // num_heads
        if rotary and self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even number of channels per head: got num_heads={num_heads}, "
                f"hidden_size={hidden_size}, which leaves {self.head_dim}"
            )
        if rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta}")
        self.rotary, self.rope_theta = rotary, rope_theta
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `keys` (rotated) and `values` [B, H, P, K]."""
        context = context or Context()
        cache, T = context.cache, x.shape[1]
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, T, K]
        offset = _offset(context)
        if self.rotary:
            rotation = self._rotation(T, context.past_length, offset, x.device)
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        if cache is not None:
            if "keys" in cache:
                k, v = torch.cat((cache["keys"], k), 2), torch.cat((cache["values"], v), 2)  # [B, H, P+T, K]
            cache["keys"], cache["values"] = k, v

        past = k.shape[2] - T
        mask = _visible(T, past, offset, x.device)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)  # [B, H, T, K]
        return self.o_proj(o.transpose(1, 2).flatten(-2))

    def _rotation(self, T: int, past_length: int, offset: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of every new token's angles, each [B or 1, 1, T, K/2] fp32."""
        position = torch.arange(past_length, past_length + T, device=device)  # [T]
        if offset is not None:
            position = position - offset.unsqueeze(-1)  # [B, T]
        exponent = torch.arange(0, self.head_dim, 2, device=device) / self.head_dim  # [K/2]
        angle = position.float().unsqueeze(-1) * self.rope_theta**-exponent  # [T, K/2] or [B, T, K/2]
        angle = angle.view(-1, 1, T, self.head_dim // 2)
        return angle.cos(), angle.sin()

    def state_size(self, sequence_length: int | None = None) -> int:
        """Keys and values of every token."""
        if sequence_length is None:
            raise ValueError("the state of attention grows with the sequence: sequence_length is needed")
        return 2 * self.hidden_size * sequence_length


def _offset(context: Context) -> Tensor | None:
    """Left padding of every row [B], or None for none; read off the mask where a caller gives only that."""
    if context.offset is not None or context.mask is None or context.past_length:
        return context.offset
    return context.mask.long().argmax(-1)  # the first real token


def _visible(T: int, past: int, offset: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys a query may read, [B or 1, 1, T, P+T] bool; None where plain causality says it all."""
    if offset is None and (past == 0 or T == 1):
        return None
    query = torch.arange(past, past + T, device=device).unsqueeze(-1)  # [T, 1]
    key = torch.arange(past + T, device=device)  # [P+T]
    visible = key <= query  # [T, P+T]
    if offset is None:
        return visible[None, None]
    # A query on padding still reads itself: a softmax over nothing would be NaN.
    return (visible & (key >= offset.view(-1, 1, 1, 1))) | (key == query)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i against channel i + K/2; x [B, H, T, K], cos and sin [B or 1, 1, T, K/2]."""
    first, second = x.float().chunk(2, dim=-1)  # [B, H, T, K/2] each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


MIXER = Attention
