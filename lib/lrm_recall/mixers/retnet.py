"""Multi-scale retention (RetNet, arXiv 2307.08621), with the parameter names of the fla-hub checkpoints.

B batch, T tokens, D hidden size, H heads, K and V key and value channels per head, W taps of the short convolutions
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer
from lrm_recall.norms import RMSNorm, RMSNormGated
from lrm_recall.ops.conv import short_conv
from lrm_recall.ops.linear import project
from lrm_recall.ops.retention import multi_scale_log_decay, retention
from lrm_recall.ops.rotary import cos_sin, rotate


class RetNet(Mixer):
    """A RetNet layer (section 2.2); option names as in flash-linear-attention's RetNetConfig.

    Args:
        hidden_size: D.
        num_heads: H; head h forgets by 1 - 2^(-5 - h) a token.
        num_kv_heads: heads of keys and values, each shared by as many query heads; H by default.
        expand_k, expand_v: key and value channels of all query heads, over D.
        use_short_conv: convolve queries, keys and values along the sequence.
        conv_size: W.
        use_output_gate: gate the normalised output with silu of a projection of the input.
        norm_eps: of the RMSNorm on each head's output.

    Raises:
        ValueError: the heads do not divide the key or value channels or leave an odd number of key channels to
            rotate, num_kv_heads does not divide the heads, or conv_size is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        use_short_conv: bool = False,
        conv_size: int = 4,
        use_output_gate: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        key_dim, value_dim = int(hidden_size * expand_k), int(hidden_size * expand_v)
        for option, width in (("expand_k", key_dim), ("expand_v", value_dim)):
            if num_heads < 1 or width < num_heads or width % num_heads:
                raise ValueError(
                    f"num_heads must divide hidden_size * {option}: got num_heads={num_heads}, "
                    f"hidden_size={hidden_size}, {option} giving {width} channels"
                )
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads
        if self.head_k_dim % 2:
            raise ValueError(
                f"rotary positions need an even number of key channels per head: got num_heads={num_heads}, "
                f"hidden_size={hidden_size}, expand_k={expand_k}, which leave {self.head_k_dim}"
            )
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide the {num_heads} heads, got {num_kv_heads}")
        if conv_size < 1:
            raise ValueError(f"conv_size must be at least 1, got {conv_size}")
        self.use_short_conv, self.use_output_gate = use_short_conv, use_output_gate
        self.widths = {
            "q": key_dim, "k": self.num_kv_heads * self.head_k_dim, "v": self.num_kv_heads * self.head_v_dim
        }  # fmt: skip
        self.conv_size = conv_size
        self.q_proj = nn.Linear(hidden_size, self.widths["q"], bias=False)
        self.k_proj = nn.Linear(hidden_size, self.widths["k"], bias=False)
        self.v_proj = nn.Linear(hidden_size, self.widths["v"], bias=False)
        if use_short_conv:
            for name, width in self.widths.items():
                self.add_module(f"{name}_conv1d", nn.Conv1d(width, width, conv_size, groups=width, bias=False))
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
            self.g_norm_swish_gate = RMSNormGated(self.head_v_dim, eps=norm_eps)
        else:
            self.g_norm = RMSNorm(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `state` [B, H, K, V] fp32 and, with short convolutions, their
        windows `q_conv`, `k_conv` and `v_conv` [B, W - 1, channels]."""
        context = context or Context()
        cache = context.cache
        if context.mask is not None:  # without biases no key comes of it, and a state of zeros decays to zeros
            x = x.masked_fill(~context.mask.unsqueeze(-1), 0)
        q, k, v = (self._project(x, name, cache) for name in self.widths)
        q, k = (y.unflatten(-1, (-1, self.head_k_dim)) for y in (q, k))  # [B, T, H or num_kv_heads, K]
        v = v.unflatten(-1, (-1, self.head_v_dim))  # [B, T, num_kv_heads, V]
        cos, sin = cos_sin(context.positions(x), self.head_k_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.num_kv_heads < self.num_heads:
            k, v = (y.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2) for y in (k, v))

        o, state = retention(
            q, k, v, multi_scale_log_decay(self.num_heads, x.device),
            initial_state=cache.get("state") if cache else None, output_final_state=cache is not None,
        )  # [B, T, H, V]
        if cache is not None:
            cache["state"] = state
        if self.use_output_gate:
            gate = self.g_proj(x).unflatten(-1, (self.num_heads, self.head_v_dim))  # [B, T, H, V]
            o = self.g_norm_swish_gate(o, gate)
        else:
            o = self.g_norm(o)
        return project(o.flatten(-2), self.o_proj)[0]

    def _project(self, x: Tensor, name: str, cache: dict[str, Tensor] | None) -> Tensor:
        """Queries, keys or values of x [B, T, D], convolved if the layer does that: [B, T, channels]."""
        y = self.get_submodule(f"{name}_proj")(x)
        if not self.use_short_conv:
            return y
        weight = self.get_submodule(f"{name}_conv1d").weight.squeeze(1)  # [channels, W]
        y, window = short_conv(y, weight, state=cache.get(f"{name}_conv") if cache else None, activation="silu")
        if cache is not None:
            cache[f"{name}_conv"] = window
        return y

    def state_size(self, sequence_length: int | None = None) -> int:
        """H * K * V, whatever the length (StateX, section 3.1); the convolutions' windows are not counted."""
        return self.num_heads * self.head_k_dim * self.head_v_dim

    def init_weights(self, std: float) -> None:
        for module in self.children():
            if isinstance(module, nn.Conv1d):
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            elif not isinstance(module, nn.Linear):
                init.ones_(module.weight)


MIXER = RetNet
