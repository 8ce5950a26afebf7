"""Gated linear attention (arXiv 2312.06635), with the parameter names of the fla-hub checkpoints.

B batch, T tokens, D hidden size, H heads, K and V key and value channels per head
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer
from lrm_recall.norms import RMSNormGated
from lrm_recall.ops.gla import gla
from lrm_recall.ops.linear import project


class GLA(Mixer):
    """A GLA layer (section 4.4); option names as in fla's GLAConfig.

    Args:
        hidden_size: D.
        num_heads: H.
        expand_k, expand_v: key and value channels of all heads together, as multiples of D.
        gate_logit_normalizer: the log of a decay is logsigmoid(logit) divided by this.
        gate_low_rank_dim: rank of the projection to the decays' logits.
        norm_eps: of the RMSNorm on each head's output.

    Raises:
        ValueError: the heads do not divide the key or value channels, or an option of the gate is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_logit_normalizer: int = 16,
        gate_low_rank_dim: int = 16,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for option, value in (
            ("gate_logit_normalizer", gate_logit_normalizer),
            ("gate_low_rank_dim", gate_low_rank_dim),
        ):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        key_dim, value_dim = int(hidden_size * expand_k), int(hidden_size * expand_v)
        for option, width in (("expand_k", key_dim), ("expand_v", value_dim)):
            if num_heads < 1 or width < num_heads or width % num_heads:
                raise ValueError(
                    f"num_heads must divide hidden_size * {option}: got num_heads={num_heads}, "
                    f"hidden_size={hidden_size}, {option} giving {width} channels"
                )
        self.num_heads = num_heads
        self.head_k_dim, self.head_v_dim = key_dim // num_heads, value_dim // num_heads
        self.gate_logit_normalizer = gate_logit_normalizer
        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(hidden_size, gate_low_rank_dim, bias=False), nn.Linear(gate_low_rank_dim, key_dim)
        )
        self.g_norm_swish_gate = RMSNormGated(self.head_v_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `state` [B, H, K, V] fp32."""
        context = context or Context()
        cache = context.cache
        layers = [self.q_proj, self.k_proj, self.v_proj, self.gk_proj[0]]
        if x.shape[1] == 1:  # the gate of a long prompt would take memory while the recurrence runs
            layers.append(self.g_proj)
        q, k, v, low_rank, *gate = project(x, *layers)
        log_decay = F.logsigmoid(self.gk_proj[1](low_rank)) / self.gate_logit_normalizer
        if context.mask is not None:
            padding = ~context.mask.unsqueeze(-1)  # [B, T, 1]
            k, log_decay = k.masked_fill(padding, 0), log_decay.masked_fill(padding, 0)
        heads = (self.num_heads, self.head_k_dim)
        q, k, log_decay = q.unflatten(-1, heads), k.unflatten(-1, heads), log_decay.unflatten(-1, heads)  # [B, T, H, K]
        v = v.unflatten(-1, (self.num_heads, self.head_v_dim))  # [B, T, H, V]

        state = cache.get("state") if cache else None
        o, state = gla(q, k, v, log_decay, initial_state=state, output_final_state=cache is not None)  # [B, T, H, V]
        if cache is not None:
            cache["state"] = state
        gate = (gate or [self.g_proj(x)])[0].unflatten(-1, (self.num_heads, self.head_v_dim))  # [B, T, H, V]
        return project(self.g_norm_swish_gate(o, gate).flatten(-2), self.o_proj)[0]

    def state_size(self, sequence_length: int | None = None) -> int:
        """H * K * V, whatever the length (StateX, section 3.2)."""
        return self.num_heads * self.head_k_dim * self.head_v_dim

    def init_weights(self, std: float) -> None:
        init.ones_(self.g_norm_swish_gate.weight)


MIXER = GLA
