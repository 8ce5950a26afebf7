"""Adapters to causal-conv1d (CUDA kernels)."""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_fn

from lrm_kernels.conv_step import conv_step
from lrm_recall.ops.dispatch import Unsupported

_TAPS = range(2, 5)
_ALIGNED = 8  # channels: the kernel reads 16 bytes at once


def short_conv(x, weight, bias=None, state=None, *, activation=None):
    D, W = weight.shape
    if x.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
        y = conv_step(x[:, 0], state, weight, bias, silu=activation == "silu")  # [B, D]; changes the state in place
        return y.unsqueeze(1), state
    if W not in _TAPS:
        raise Unsupported(f"it takes 2 to 4 taps, got {W}")
    if x.dtype == torch.float64:
        raise Unsupported("its kernels do not take float64")
    if D % _ALIGNED:
        raise Unsupported(f"its channels must be a multiple of {_ALIGNED}, got {D}")
    if x.stride(1) % _ALIGNED or x.stride(2) != 1:
        x = x.contiguous()
    y = causal_conv1d_fn(x.mT, weight, bias, initial_states=None if state is None else state.mT, activation=activation)
    return y.mT, last_inputs(x, W - 1, state)


def last_inputs(x, count, state):
    """The last `count` inputs [B, count, D] of x [B, T, D] and of the state before it, in memory of their own."""
    if x.shape[1] >= count:
        return x[:, x.shape[1] - count :].clone()
    before = x.new_zeros(x.shape[0], count, x.shape[2]) if state is None else state
    return torch.cat((before, x), dim=1)[:, x.shape[1] :]
