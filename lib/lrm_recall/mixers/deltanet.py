"""DeltaNet (arXiv 2406.06484), with the parameter names of the fla-hub checkpoints, and what Gated DeltaNet shares.

B batch, T tokens, D hidden size, H heads, K and V key and value channels per head, W taps of the short convolutions
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer
from lrm_recall.norms import RMSNorm, RMSNormGated
from lrm_recall.ops.conv import short_conv
from lrm_recall.ops.delta_rule import delta_rule
from lrm_recall.ops.linear import project

_ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}
_QK_NORMS = ("l2", "sum")


class DeltaMixer(Mixer):
    """What stands around a delta rule: projections and short convolutions before it, norm and gate behind it.

    A subclass says with `recur` which rule it is.

    Args:
        hidden_size: D.
        num_heads: heads of queries and keys.
        num_v_heads: H, heads of values, of beta and of the state.
        head_k_dim, head_v_dim: K, V.
        use_beta, use_gate, use_short_conv, conv_size, qk_activation, qk_norm, allow_neg_eigval, norm_eps: as DeltaNet.

    Raises:
        ValueError: conv_size is not positive, or qk_activation or qk_norm is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        use_beta: bool = True,
        use_gate: bool,
        use_short_conv: bool,
        conv_size: int,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        allow_neg_eigval: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        if conv_size < 1:
            raise ValueError(f"conv_size must be at least 1, got {conv_size}")
        for option, value, known in (
            ("qk_activation", qk_activation, _ACTIVATIONS),
            ("qk_norm", qk_norm, _QK_NORMS),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")
        self.num_heads, self.num_v_heads = num_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        self.use_beta, self.use_gate, self.use_short_conv = use_beta, use_gate, use_short_conv
        self.qk_activation, self.qk_norm = qk_activation, qk_norm
        self.allow_neg_eigval = allow_neg_eigval

        key_dim, value_dim = num_heads * head_k_dim, num_v_heads * head_v_dim
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        if use_beta:
            self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        if use_short_conv:
            self.q_conv1d = nn.Conv1d(key_dim, key_dim, conv_size, groups=key_dim, bias=False)
            self.k_conv1d = nn.Conv1d(key_dim, key_dim, conv_size, groups=key_dim, bias=False)
            self.v_conv1d = nn.Conv1d(value_dim, value_dim, conv_size, groups=value_dim, bias=False)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.o_norm = (RMSNormGated if use_gate else RMSNorm)(head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, x: Tensor, padding: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the rule.

        Args:
            q, k: [B, T, num_heads, K].
            v: [B, T, H, V].
            beta: [B, T, H], 0 on padding.
            x: [B, T, D], the layer's input, 0 on padding.
            padding: [B, T, 1] bool, or None where there is none.
            options: of the op: l2_norm, initial_state, output_final_state.

        Returns:
            o [B, T, H, V], and the state after the last token [B, H, K, V] if it was asked for.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D].

        The cache holds `state` [B, H, K, V] fp32 and the inputs that the convolutions have yet to read, `q_conv`,
        `k_conv` and `v_conv` [B, W - 1, channels].
        """
        context = context or Context()
        cache, padding = context.cache, None if context.mask is None else ~context.mask.unsqueeze(-1)  # [B, T, 1]
        if padding is not None:
            x = x.masked_fill(padding, 0)  # what a convolution sees before its first input
        q, k, v, *beta = project(x, self.q_proj, self.k_proj, self.v_proj, *([self.b_proj] if self.use_beta else []))
        q = self._convolve(q, "q_conv", self.qk_activation, cache).unflatten(-1, (-1, self.head_k_dim))
        k = self._convolve(k, "k_conv", self.qk_activation, cache).unflatten(-1, (-1, self.head_k_dim))
        v = self._convolve(v, "v_conv", "silu", cache).unflatten(-1, (-1, self.head_v_dim))
        beta = beta[0].sigmoid() if beta else x.new_ones(*x.shape[:2], self.num_v_heads)  # [B, T, H]
        if self.allow_neg_eigval:
            beta = 2 * beta
        if padding is not None:
            beta = beta.masked_fill(padding, 0)  # neither reads the state nor writes it

        state = cache.get("state") if cache else None
        if self.qk_norm == "sum":
            q, k = (F.normalize(y, p=1, dim=-1, eps=1e-6) for y in (q, k))
        o, state = self.recur(
            q, k, v, beta, x, padding,
            l2_norm=self.qk_norm == "l2", initial_state=state, output_final_state=cache is not None,
        )  # [B, T, H, V]
        if cache is not None:
            cache["state"] = state
        gate = [self.g_proj(x).unflatten(-1, (-1, self.head_v_dim))] if self.use_gate else []  # [B, T, H, V]
        return project(self.o_norm(o, *gate).flatten(-2), self.o_proj)[0]

    def _convolve(self, x: Tensor, window: str, activation: str, cache: dict[str, Tensor] | None) -> Tensor:
        """x [B, T, channels] through the short convolution of that window, if the layer has them, and activation."""
        if self.use_short_conv:
            weight = getattr(self, f"{window}1d").weight.squeeze(1)  # [channels, W]
            past = cache.get(window) if cache else None
            fused = activation if activation == "silu" else None
            x, past = short_conv(x, weight, state=past, activation=fused)
            if cache is not None:
                cache[window] = past
            if fused:
                return x
        return _ACTIVATIONS[activation](x)

    def state_size(self, sequence_length: int | None = None) -> int:
        """H * K * V, whatever the length (StateX, section 3.1); the convolutions' windows are not counted."""
        return self.num_v_heads * self.head_k_dim * self.head_v_dim

    def init_weights(self, std: float) -> None:
        """As flash-linear-attention does: the convolutions are drawn like a linear layer."""
        if self.use_short_conv:
            for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
                init.normal_(conv.weight, std=std)
        init.ones_(self.o_norm.weight)


class DeltaNet(DeltaMixer):
    """A DeltaNet layer (section 3.4); option names as in fla's DeltaNetConfig.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: key and value channels of all heads together, as multiples of D.
        use_beta: learn how much of a token is written; without it all of it is, beta = 1.
        use_gate: gate the output with a projection of the input.
        use_short_conv: convolve queries, keys and values.
        conv_size: W; without effect where there is no convolution.
        qk_activation: of queries and keys, "silu", "relu", "elu" (plus one) or "identity".
        qk_norm: of queries and keys, "l2" or "sum" (of the absolute values).
        allow_neg_eigval: let beta reach 2 instead of 1, for eigenvalues of the transition down to -1
            (arXiv 2411.12537).
        norm_eps: of the RMSNorm on each head's output.

    Raises:
        ValueError: the heads do not divide the key or value channels, conv_size is not positive, or qk_activation or
            qk_norm is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 16,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        use_beta: bool = True,
        use_gate: bool = False,
        use_short_conv: bool = True,
        conv_size: int = 4,
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_v_heads=num_heads,
            head_k_dim=_channels_per_head(hidden_size, "expand_k", expand_k, num_heads),
            head_v_dim=_channels_per_head(hidden_size, "expand_v", expand_v, num_heads),
            use_beta=use_beta,
            use_gate=use_gate,
            use_short_conv=use_short_conv,
            conv_size=conv_size,
            qk_activation=qk_activation,
            qk_norm=qk_norm,
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
        )

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, x: Tensor, padding: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return delta_rule(q, k, v, beta, **options)


def _channels_per_head(hidden_size: int, option: str, expand: float, num_heads: int) -> int:
    channels = hidden_size * expand
    width = round(channels)
    if num_heads < 1 or width < num_heads or width % num_heads or not math.isclose(channels, width):
        raise ValueError(
            f"num_heads must divide hidden_size * {option}: got num_heads={num_heads}, hidden_size={hidden_size}, "
            f"{option} giving {channels:g} channels"
        )
    return width // num_heads


MIXER = DeltaNet
