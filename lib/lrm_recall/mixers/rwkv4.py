"""RWKV4's time mixing (RWKV, arXiv 2305.13048), with the parameter names of the zoology repository.

The channel mixing of RWKV is not here: it is a block's MLP.

B batch, T tokens, D hidden size
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer
from lrm_recall.ops.rwkv4 import NOTHING, rwkv4


class RWKV4(Mixer):
    """The layer of zoology's MQAR figure; option names as there.

    Args:
        hidden_size: D.
        n_layer, layer_idx: layers of the model and the index of this one, which the initial values depend on.

    Raises:
        ValueError: layer_idx is not the index of one of n_layer layers.
    """

    def __init__(self, hidden_size: int, *, n_layer: int = 12, layer_idx: int = 0) -> None:
        super().__init__()
        if not 0 <= layer_idx < n_layer:
            raise ValueError(f"layer_idx must be from 0 to n_layer - 1, got layer_idx={layer_idx}, n_layer={n_layer}")
        self.hidden_size, self.n_layer, self.layer_idx = hidden_size, n_layer, layer_idx
        self.time_decay = nn.Parameter(torch.empty(hidden_size))
        self.time_first = nn.Parameter(torch.empty(hidden_size))
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.init_weights(std=0.0)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `shift` [B, 1, D], the last input, and `state` [B, 3, D] fp32."""
        context = context or Context()
        cache = context.cache
        x, previous = token_shift(x, context)
        k = self.key(time_mix(x, previous, self.time_mix_k))
        v = self.value(time_mix(x, previous, self.time_mix_v))
        r = self.receptance(time_mix(x, previous, self.time_mix_r))
        if context.mask is not None:  # the weight of a key of 0 is 1
            k = k.float().masked_fill(~context.mask.unsqueeze(-1), NOTHING)
        wkv, state = rwkv4(
            self.time_decay, self.time_first, k, v,
            initial_state=cache.get("state") if cache else None, output_final_state=cache is not None,
        )  # [B, T, D]
        if cache is not None:
            cache["state"] = state
        return self.output(r.sigmoid() * wkv)

    def state_size(self, sequence_length: int | None = None) -> int:
        """Numerator, denominator and log scale of every channel, and the last input."""
        return 4 * self.hidden_size

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Decays from slow to fast over the channels, the more of them slow the deeper the layer."""
        D = self.hidden_size
        init.copy_(self.time_decay, decay_speed(D, self.layer_idx, self.n_layer, slowest=-5.0, fastest=3.0))
        init.copy_(self.time_first, math.log(0.3) + 0.5 * zigzag(D))
        for name, value in initial_mix(D, self.layer_idx, self.n_layer).items():
            init.copy_(self.get_parameter(f"time_mix_{name}"), value)


def token_shift(x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """The input with zeros on the padding, and the input before each: both [B, T, D].

    Zeros stand before the first real token. A cache holds the last input as `shift` [B, 1, D].
    """
    if context.mask is not None:
        x = x.masked_fill(~context.mask.unsqueeze(-1), 0)
    last = context.cache.get("shift") if context.cache else None
    previous = torch.cat((torch.zeros_like(x[:, :1]) if last is None else last, x[:, :-1]), dim=1)  # [B, T, D]
    if context.cache is not None:
        context.cache["shift"] = x[:, -1:].clone()  # a view would keep all of x
    return x, previous


def time_mix(x: Tensor, previous: Tensor, mix: Tensor) -> Tensor:
    """mix * x + (1 - mix) * previous."""
    return previous + mix * (x - previous)


def depth(layer: int, n_layer: int) -> float:
    """Where a layer stands, from 0 for the first to 1 for the last."""
    return layer / max(n_layer - 1, 1)


def decay_speed(size: int, layer: int, n_layer: int, *, slowest: float, fastest: float) -> Tensor:
    """Initial w in the decays exp(-exp(w)): [size] fp32, rising the later the deeper the layer."""
    channel = torch.arange(size, dtype=torch.float32) / max(size - 1, 1)
    return slowest + (fastest - slowest) * channel ** (0.7 + 1.3 * depth(layer, n_layer))


def zigzag(size: int) -> Tensor:
    """0, 1, -1, 0, 1, -1, ...: [size] fp32."""
    return (torch.arange(size, dtype=torch.float32) + 1) % 3 - 1


def initial_mix(hidden_size: int, layer: int, n_layer: int) -> dict[str, Tensor]:
    """Initial shares of the token itself in the inputs of k, v and r (and of RWKV5's g): each [1, 1, D] fp32."""
    channel = (torch.arange(hidden_size, dtype=torch.float32) / hidden_size)[None, None]  # [1, 1, D]
    k, r = channel ** (1 - layer / n_layer), channel ** (0.5 * (1 - layer / n_layer))
    return {"k": k, "v": k + 0.3 * depth(layer, n_layer), "r": r}


MIXER = RWKV4
