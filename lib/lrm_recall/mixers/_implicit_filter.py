"""What the mixers with a filter that is a function of the lag (BaseConv, Hyena) share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEATURES = 3  # of a lag: time, and one complex exponential as two reals


def lag_features(max_length: int) -> Tensor:
    """Time from 0 to 1, and a cosine and sine of it, for every lag: [1, max_length, 3]."""
    steps = torch.arange(max_length)
    time = steps / max(max_length - 1, 1)
    # zoology's single band has frequency 1e-4, not 1: linspace(1e-4, bands - 1, bands) with one band
    phase = 1e-4 * 2 * math.pi * steps / max_length
    return torch.stack((time, phase.cos(), -phase.sin()), dim=-1).unsqueeze(0)  # [1, max_length, 3]


def check_length(inputs: Tensor, max_length: int, option: str) -> None:
    """Raise ValueError if the sequence [B, T, D] is longer than its filter.

    Args:
        option: how the mixer calls `max_length`.
    """
    length = inputs.shape[1]
    if length > max_length:
        raise ValueError(
            f"a sequence of {length} tokens is longer than the long convolution's filter: {option} is {max_length}"
        )
