"""Hyena (arXiv 2302.10866) of order 2, as zoology's and mad-lab's experiments use it, with zoology's parameter names.

    pre, post, v = short_conv(in_proj(x))
    y = out_proj(post * long_conv(pre * v))

The long filter is a function of the lag (section 3.3): an MLP with sine activations, times a window that decays
exponentially, at another rate in every channel. mad-lab's layer has pre and post the other way round, which its tied
projections do not let one swap alone; with the order of the channels inside reversed as well, its weights fit.

B batch, T tokens, P tokens in the cache, D hidden size, E channels inside, W taps of the short filter, L lags
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers._implicit_filter import FEATURES, check_length, lag_features
from lrm_recall.mixers.base import Mixer
from lrm_recall.ops.conv import long_conv, short_conv

# The window of the slowest and of the fastest channel falls to _TARGET at these fractions of l_max (zoology).
_TARGET, _SLOWEST, _FASTEST = 1e-2, 1.5, 0.3


class Sin(nn.Module):
    """The sine of learned multiples of the input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.ones(1, size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class PositionalEmbedding(nn.Module):
    """What the filter knows of a lag: z [1, l_max, 3], learned from there on, and t [1, l_max, 1] from 0 to 1."""

    def __init__(self, l_max: int) -> None:
        super().__init__()
        self.l_max = l_max
        self.z = nn.Parameter(lag_features(l_max))
        self.register_buffer("t", lag_features(l_max)[..., :1].clone())


class ExponentialModulation(nn.Module):
    """The rates at which the channels' windows decay, [1, 1, E], constant."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("deltas", self.values())

    def values(self) -> Tensor:
        return torch.linspace(math.log(_TARGET) / _SLOWEST, math.log(_TARGET) / _FASTEST, self.size)[None, None]


class ImplicitFilter(nn.Module):
    """The long filter: the MLP of the lag times the window, and at lag 0 a bias for every channel."""

    def __init__(self, size: int, filter_order: int, l_max: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(size))
        self.pos_emb = PositionalEmbedding(l_max)
        # Numbered as in zoology's nn.Sequential, where one sine stands at 1, 3 and 5; listed there as well, it would be
        # a tied parameter, which transformers refuses to save unless the model declares it.
        self.implicit_filter = nn.ModuleDict({
            "0": nn.Linear(FEATURES, filter_order), "1": Sin(filter_order),
            "2": nn.Linear(filter_order, filter_order),
            "4": nn.Linear(filter_order, filter_order),
            "6": nn.Linear(filter_order, size, bias=False),
        })  # fmt: skip
        self.modulation = ExponentialModulation(size)
        self.register_load_state_dict_pre_hook(_drop_repeated_sines)

    def forward(self, length: int) -> Tensor:
        """The first taps of the filter, [L, E]."""
        h, t = self.pos_emb.z[0, :length], self.pos_emb.t[0, :length]  # [L, 3], [L, 1]
        mlp = self.implicit_filter
        for layer in ("0", "2", "4"):
            h = mlp["1"](mlp[layer](h))
        taps = mlp["6"](h) * torch.exp(-t * self.modulation.deltas[0].abs())  # [L, E]
        return torch.cat((taps[:1] + self.bias, taps[1:]))

    def init_weights(self) -> None:
        init.normal_(self.bias)
        init.copy_(self.pos_emb.z, lag_features(self.pos_emb.l_max))
        init.copy_(self.pos_emb.t, lag_features(self.pos_emb.l_max)[..., :1])
        init.ones_(self.implicit_filter["1"].freq)
        init.copy_(self.modulation.deltas, self.modulation.values())


def _drop_repeated_sines(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for place in ("3", "5"):
        state_dict.pop(f"{prefix}implicit_filter.{place}.freq", None)


class Hyena(Mixer):
    """A Hyena layer; option names as in zoology, and in mad-lab where zoology has no such option.

    Args:
        hidden_size: D.
        l_max: longest sequence, padding included, that the filter is made for.
        filter_order: width of the MLP that gives the filter.
        short_filter_order: W.
        inner_factor: E / D.
        proj_groups: how often the channels of in_proj are repeated to make 3E of them.

    Raises:
        ValueError: an option is not positive, or proj_groups does not divide 3E; at a call, a sequence longer than
            l_max.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        l_max: int = 2048,
        filter_order: int = 64,
        short_filter_order: int = 3,
        inner_factor: int = 1,
        proj_groups: int = 1,
    ) -> None:
        super().__init__()
        for option, value in (
            ("l_max", l_max),
            ("filter_order", filter_order),
            ("short_filter_order", short_filter_order),
            ("inner_factor", inner_factor),
            ("proj_groups", proj_groups),
        ):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        inner = inner_factor * hidden_size
        if 3 * inner % proj_groups:
            raise ValueError(f"proj_groups must divide the {3 * inner} channels of the projections, got {proj_groups}")
        self.inner_size, self.l_max, self.proj_groups = inner, l_max, proj_groups
        self.in_proj = nn.Linear(hidden_size, 3 * inner // proj_groups)
        self.short_filter = nn.Conv1d(3 * inner, 3 * inner, short_filter_order, groups=3 * inner)
        self.filter_fn = ImplicitFilter(inner, filter_order, l_max)
        self.out_proj = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `conv` [B, W - 1, 3E] and `inputs` [B, P, E] of the long filter."""
        context = context or Context()
        cache, T = context.cache, x.shape[1]
        padding = None if context.mask is None else ~context.mask.unsqueeze(-1)  # [B, T, 1]
        projected = self.in_proj(x)
        if padding is not None:
            projected = projected.masked_fill(padding, 0)  # what a convolution sees before its first input
        if self.proj_groups > 1:
            projected = projected.repeat(1, 1, self.proj_groups)  # [B, T, 3E]

        weight = self.short_filter.weight.squeeze(1)  # [3E, W]
        projected, conv = short_conv(projected, weight, self.short_filter.bias, cache.get("conv") if cache else None)
        pre, post, v = projected.chunk(3, dim=-1)  # [B, T, E]
        inputs = pre * v
        if padding is not None:
            inputs = inputs.masked_fill(padding, 0)
        if cache:
            inputs = torch.cat((cache["inputs"], inputs), dim=1)  # [B, P+T, E]
        check_length(inputs, self.l_max, "l_max")
        if cache is not None:
            cache["conv"], cache["inputs"] = conv, inputs
        y = long_conv(inputs, self.filter_fn(inputs.shape[1]), outputs=T)
        return self.out_proj(post * y)

    def state_size(self, sequence_length: int | None = None) -> int:
        """The inputs of the long filter, all of them; the window of the short one is not counted, as in Mamba2."""
        if sequence_length is None:
            raise ValueError("the state of a long convolution grows with the sequence: sequence_length is needed")
        return self.inner_size * sequence_length

    def init_weights(self, std: float) -> None:
        """The projections, and the linear layers of the filter, are the model's to fill."""
        init.kaiming_uniform_(self.short_filter.weight, a=math.sqrt(5))
        bound = self.short_filter.kernel_size[0] ** -0.5
        init.uniform_(self.short_filter.bias, -bound, bound)
        self.filter_fn.init_weights()


MIXER = Hyena
