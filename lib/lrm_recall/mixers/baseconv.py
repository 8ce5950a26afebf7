"""BaseConv (Zoology, arXiv 2312.04927, section 4.2): a convolution gated by a linear projection.

    y = conv(x) * projection(x) + x

Parameter names as in the zoology repository. B batch, T tokens, D hidden size, W taps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers._implicit_filter import FEATURES, check_length, lag_features
from lrm_recall.mixers.base import Mixer
from lrm_recall.ops.conv import long_conv, short_conv

_FILTER_HIDDEN_DIM = 16


class ShortConvolution(nn.Module):
    """A learned filter of a few taps; holds the parameters as an nn.Conv1d, whose names checkpoints use."""

    def __init__(self, hidden_size: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(hidden_size, hidden_size, kernel_size, groups=hidden_size)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] and the W - 1 inputs before it to y [B, T, D] and the last W - 1 inputs."""
        return short_conv(x, self.conv.weight.squeeze(1), self.conv.bias, past)

    def init_weights(self) -> None:
        init.kaiming_uniform_(self.conv.weight, a=math.sqrt(5))
        bound = self.conv.kernel_size[0] ** -0.5
        init.uniform_(self.conv.bias, -bound, bound)


class PositionalEmbedding(nn.Module):
    """The positions that the implicit filter is a function of: [1, max_length, 3], constant."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.register_buffer("z", lag_features(max_length))


class ImplicitLongConvolution(nn.Module):
    """A filter as long as the sequence, given by a small MLP of the lag, plus the input itself."""

    def __init__(self, hidden_size: int, max_length: int) -> None:
        super().__init__()
        self.pos_emb = PositionalEmbedding(max_length)
        self.mlp = nn.Sequential(
            nn.Linear(FEATURES, _FILTER_HIDDEN_DIM), nn.ReLU(), nn.Linear(_FILTER_HIDDEN_DIM, hidden_size)
        )

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] and all inputs before it [B, P, D] to y [B, T, D] and all inputs [B, P + T, D]."""
        T = x.shape[1]
        inputs = x if past is None else torch.cat((past, x), dim=1)
        check_length(inputs, self.pos_emb.max_length, "max_length")
        kernel = self.mlp(self.pos_emb.z[0, : inputs.shape[1]])  # [P+T, D]
        return long_conv(inputs, kernel, outputs=T) + x, inputs

    def init_weights(self) -> None:
        init.copy_(self.pos_emb.z, lag_features(self.pos_emb.max_length))


class BaseConv(Mixer):
    """A BaseConv layer.

    Args:
        hidden_size: D.
        kernel_size: taps of the convolution; -1 for an implicit one as long as the sequence.
        max_length: longest sequence, padding included, that the long convolution is made for; without effect on a
            short one.

    Raises:
        ValueError: kernel_size is neither -1 nor positive, or max_length is not positive; at a call, a sequence
            longer than max_length.
    """

    def __init__(self, hidden_size: int, *, kernel_size: int = 3, max_length: int = 2048) -> None:
        super().__init__()
        if kernel_size != -1 and kernel_size < 1:
            raise ValueError(f"kernel_size must be at least 1, or -1 for a long convolution, got {kernel_size}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.hidden_size = hidden_size
        self.kernel_size = kernel_size
        self.projection = nn.Linear(hidden_size, hidden_size)
        if kernel_size == -1:
            self.conv = ImplicitLongConvolution(hidden_size, max_length)
        else:
            self.conv = ShortConvolution(hidden_size, kernel_size)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x [B, T, D] to [B, T, D]. The cache holds `inputs` [B, W - 1 or all, D], the inputs yet to be read."""
        context = context or Context()
        cache = context.cache
        if context.mask is not None:
            x = x.masked_fill(~context.mask.unsqueeze(-1), 0)  # what a convolution sees before its first input
        conv, inputs = self.conv(x, cache.get("inputs") if cache else None)
        if cache is not None:
            cache["inputs"] = inputs
        return torch.addcmul(x, conv, self.projection(x))

    def state_size(self, sequence_length: int | None = None) -> int:
        """The inputs carried: W - 1 of them, or the whole sequence for a long convolution."""
        if self.kernel_size != -1:
            return self.hidden_size * (self.kernel_size - 1)
        if sequence_length is None:
            raise ValueError("the state of a long convolution grows with the sequence: sequence_length is needed")
        return self.hidden_size * sequence_length

    def init_weights(self, std: float) -> None:
        self.conv.init_weights()


MIXER = BaseConv
