"""Causal softmax attention with rotary positions: the Transformer that recurrent models are held against.

B batch, T new tokens, P tokens in the cache, D hidden size, H query heads, G heads of keys and values, K channels per
head, W tokens in the window
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer
from lrm_recall.ops.attention_step import attention_step
from lrm_recall.ops.linear import project
from lrm_recall.ops.rotary import cos_sin, rotate

_LEAST_PIECE = 128  # tokens that a narrow window is worked on at a time


class Attention(Mixer):
    """Multi-head attention.

    Args:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: G; each serves H / G query heads (grouped queries, arXiv 2305.13245). None for H.
        window: W; a query reads itself and the W - 1 tokens before it. None for all tokens before it.
        bias: biases on the four projections.
        rotary: rotate queries and keys by their position (RoFormer, arXiv 2104.09864, section 3.2), counted from each
            row's first real token; without it the layer knows no order but causality.
        rope_theta: base of the rotation's wavelengths.

    Raises:
        ValueError: the heads do not divide the hidden size, or leave an odd number of channels to rotate; num_kv_heads
            does not divide them; the window or the base is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        window: int | None = None,
        bias: bool = False,
        rotary: bool = True,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size: got num_heads={num_heads}, hidden_size={hidden_size}")
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide the {num_heads} heads, got {num_kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if rotary and self.head_dim % 2:
            raise ValueError(
                f"rotary positions need an even number of channels per head: got num_heads={num_heads}, "
                f"hidden_size={hidden_size}, which leaves {self.head_dim}"
            )
        if rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta}")
        self.window, self.rope_theta = window, rope_theta if rotary else None
        kv_dim = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `keys` (rotated) and `values` [B, G, P, K]; see `attend`."""
        if self.growing_states and context is not None and isinstance(context.past_length, Tensor):
            return self._step(x, context)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, T, H or G, K]
        o = attend(q, k, v, context or Context(), window=self.window, rope_theta=self.rope_theta)  # [B, T, H, K]
        return self.o_proj(o.flatten(-2))

    def _step(self, x: Tensor, context: Context) -> Tensor:
        """As `forward`, for one token x [B, 1, D] and a cache whose keys and values have room for it."""
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)  # [B, 1, H K or G K] each
        q, k, v = (y.squeeze(1).unflatten(-1, (-1, self.head_dim)) for y in projected)  # [B, H or G, K]
        keys, values = context.cache["keys"], context.cache["values"]  # [B, G, C, K]
        o = attention_step(
            q, k, v, keys, values, context.past_length, context.offset, rope_theta=self.rope_theta
        )  # [B, H, K]
        return project(o.flatten(1).unsqueeze(1), self.o_proj)[0]

    @property
    def growing_states(self) -> dict[str, int]:
        """What of the cache grows by a token each step, and along which dimension: a step can run on buffers with
        room for more (`lrm_recall.decode`)."""
        return {"keys": 2, "values": 2} if self.window is None else {}

    def state_size(self, sequence_length: int | None = None) -> int:
        """Keys and values: of every token, or of the W - 1 tokens of a window, whatever the length."""
        return 2 * self.num_kv_heads * self.head_dim * cached_tokens(self.window, sequence_length)


def attend(
    q: Tensor, k: Tensor, v: Tensor, context: Context, *, window: int | None = None, rope_theta: float | None = None
) -> Tensor:
    """Causal attention to the tokens of this call and of the cache, which is brought up to date.

    Args:
        q: [B, T, H, K]. k, v: [B, T, G, K], G dividing H.
        context: its cache holds `keys` and `values` [B, G, P, K]: of all tokens so far, or with a window always of
            P = W - 1 slots, the last tokens at the end and zeros in slots that no token has filled yet.
        window: W, tokens that a query reads, itself included; None for all.
        rope_theta: base of the wavelengths of rotary positions; None for none.

    Returns:
        [B, T, H, K].
    """
    context, cache = replace(context, offset=_offset(context)), context.cache
    if rope_theta is not None:
        angles = cos_sin(context.positions(q), q.shape[-1], rope_theta)
        q, k = rotate(q, *angles), rotate(k, *angles)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H or G, T, K]
    past_k, past_v = (cache["keys"], cache["values"]) if cache and "keys" in cache else (k[:, :, :0], v[:, :, :0])

    # With a window, in pieces that have a cache before them as in decoding: no mask of all queries by all keys.
    piece = q.shape[2] if window is None else max(window, _LEAST_PIECE)
    pieces = zip(*(y.split(piece, dim=2) for y in (q, k, v)), strict=True)
    outputs, start = [], context.past_length
    for q, k, v in pieces:
        past, T = past_k.shape[2], q.shape[2]
        if past:
            k, v = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)  # [B, G, P+T, K]
        mask = _visible(T, past, start, window, context.offset, q.device)
        causal = mask is None and T > 1
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(o.transpose(1, 2))  # [B, T, H, K]
        start = start + T
        past_k, past_v = (k, v) if window is None else (_last(k, window - 1), _last(v, window - 1))
    if cache is not None:
        cache["keys"], cache["values"] = past_k, past_v
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def cached_tokens(window: int | None, sequence_length: int | None) -> int:
    """Slots P whose keys and values `attend` keeps.

    Raises:
        ValueError: their number grows with the sequence and no length was given.
    """
    if window is not None:
        return window - 1
    if sequence_length is None:
        raise ValueError("the state of attention grows with the sequence: sequence_length is needed")
    return sequence_length


def _last(x: Tensor, tokens: int) -> Tensor:
    """The last tokens of x [B, G, P, K], behind zeros if there are fewer; a copy, as a view would keep all of x."""
    missing = tokens - x.shape[2]
    return F.pad(x, (0, 0, missing, 0)) if missing > 0 else x[:, :, -missing:].clone()


def _offset(context: Context) -> Tensor | None:
    """Left padding of every row [B], or None for none; read off the mask where a caller gives only that."""
    if context.offset is not None or context.mask is None or context.past_length:
        return context.offset
    return context.mask.long().argmax(-1)  # the first real token


def _visible(
    T: int, past: int, start: int | Tensor, window: int | None, offset: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys a query may read, [T, P+T] or [B, 1, T, P+T] bool; None where plain causality says it all.

    Args:
        past: P, slots before the first query. start: position of the first query, padding included.
        offset: [B], left padding of every row.
    """
    within = window is None or past + T <= window
    filled = isinstance(start, int) and start >= past  # a position on the device must not be read here
    if offset is None and within and filled and (past == 0 or T == 1):
        return None
    key = torch.arange(-past, T, device=device) + start  # [P+T]
    query = key[past:].unsqueeze(-1)  # [T, 1]
    visible = key <= query  # [T, P+T]
    if not within:
        visible &= key > query - window
    if offset is None:
        return visible & (key >= 0)
    # A query on padding still reads itself: a softmax over nothing would be NaN.
    return (visible & (key >= offset.view(-1, 1, 1, 1))) | (key == query)


MIXER = Attention
