"""RWKV5's time mixing (Eagle, arXiv 2404.05892), with the parameter names of mad-lab and zoology.

The channel mixing of RWKV is not here: it is a block's MLP.

B batch, T tokens, D hidden size, A attention channels, H heads, K key and value channels per head
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer
from lrm_recall.mixers.rwkv4 import decay_speed, depth, initial_mix, time_mix, token_shift, zigzag
from lrm_recall.ops.rwkv5 import rwkv5


class RWKV5(Mixer):
    """An RWKV5 time-mixing layer; option names as in mad-lab.

    Args:
        hidden_size: D.
        head_dim: K; the heads are then A / K.
        dim_att: A; D by default.
        head_dim_divisor: divides every head's output before its normalisation, which makes its epsilon the larger.
        n_layer, layer_id: layers of the model and the index of this one, which the initial values depend on.

    Raises:
        ValueError: head_dim does not divide dim_att, head_dim_divisor is not positive, or layer_id is not the index
            of one of n_layer layers.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        head_dim: int = 16,
        dim_att: int | None = None,
        head_dim_divisor: int = 8,
        n_layer: int = 1,
        layer_id: int = 0,
    ) -> None:
        super().__init__()
        dim_att = hidden_size if dim_att is None else dim_att
        if head_dim < 1 or dim_att < head_dim or dim_att % head_dim:
            raise ValueError(f"head_dim must divide dim_att: got head_dim={head_dim}, dim_att={dim_att}")
        if head_dim_divisor < 1:
            raise ValueError(f"head_dim_divisor must be at least 1, got {head_dim_divisor}")
        if not 0 <= layer_id < n_layer:
            raise ValueError(f"layer_id must be from 0 to n_layer - 1, got layer_id={layer_id}, n_layer={n_layer}")
        self.hidden_size, self.dim_att = hidden_size, dim_att
        self.num_heads, self.head_dim = dim_att // head_dim, head_dim
        self.head_dim_divisor = head_dim_divisor
        self.n_layer, self.layer_id = n_layer, layer_id
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_g = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_decay = nn.Parameter(torch.empty(self.num_heads, head_dim))
        self.time_faaaa = nn.Parameter(torch.empty(self.num_heads, head_dim))
        self.receptance = nn.Linear(hidden_size, dim_att, bias=False)
        self.key = nn.Linear(hidden_size, dim_att, bias=False)
        self.value = nn.Linear(hidden_size, dim_att, bias=False)
        self.output = nn.Linear(dim_att, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, dim_att, bias=False)
        self.ln_x = nn.GroupNorm(self.num_heads, dim_att)
        self.init_weights(std=0.0)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds the last input `shift` [B, 1, D] and `state` [B, H, K, K] fp32."""
        context = context or Context()
        cache = context.cache
        x, previous = token_shift(x, context)  # zeros on padding, so that keys there are zeros, too
        r, k, v, g = (
            projection(time_mix(x, previous, mix))
            for projection, mix in (
                (self.receptance, self.time_mix_r), (self.key, self.time_mix_k),
                (self.value, self.time_mix_v), (self.gate, self.time_mix_g),
            )
        )  # [B, T, A]  # fmt: skip
        r, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in (r, k, v))  # [B, T, H, K]
        o, state = rwkv5(
            r, k, v, -self.time_decay.float().exp(), self.time_faaaa,
            initial_state=cache.get("state") if cache else None, output_final_state=cache is not None,
        )  # [B, T, H, K]
        if cache is not None:
            cache["state"] = state
        o = self.ln_x(o.reshape(-1, self.dim_att) / self.head_dim_divisor).view_as(g)  # [B, T, A]
        return self.output(o * F.silu(g))

    def state_size(self, sequence_length: int | None = None) -> int:
        """H * K * K and the last input."""
        return self.dim_att * self.head_dim + self.hidden_size

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Decays from slow to fast over the channels, the more of them slow the deeper the layer."""
        A, heads, position = self.dim_att, self.time_decay.shape, depth(self.layer_id, self.n_layer)
        speed = decay_speed(A, self.layer_id, self.n_layer, slowest=-6.0, fastest=-1.0)
        init.copy_(self.time_decay, speed.view(heads))
        falling = 1 - torch.arange(A, dtype=torch.float32) / max(A - 1, 1)  # [A], from 1 to 0
        init.copy_(self.time_faaaa, (position * falling + 0.1 * zigzag(A)).view(heads))
        mix = initial_mix(self.hidden_size, self.layer_id, self.n_layer)
        for name in "kvrg":
            init.copy_(self.get_parameter(f"time_mix_{name}"), mix["r" if name == "g" else name])
        init.ones_(self.ln_x.weight)
        init.zeros_(self.ln_x.bias)


MIXER = RWKV5
