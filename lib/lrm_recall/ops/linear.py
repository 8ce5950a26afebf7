"""Linear layers of one input, and the SwiGLU made of three; on a GPU one or two launches for a single token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrm_recall.ops.dispatch import dispatched


def linears_torch(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """x [..., K] times each of the weights [N_i, K], transposed: [..., N_i]."""
    return [F.linear(x, weight) for weight in weights]


def swiglu_torch(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T: x [..., D], gate and up [F, D], down [D, F], result [..., D]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


linears = dispatched("linears", linears_torch)
swiglu = dispatched("swiglu", swiglu_torch)


def project(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """Each layer of x [B, T, K]. One token on a GPU, without gradients, goes through all of them in one launch."""
    if x.is_cuda and x.shape[1] == 1 and not torch.is_grad_enabled() and plain(*layers):
        return linears(x, *(layer.weight for layer in layers))
    return [layer(x) for layer in layers]


def plain(*layers: nn.Module) -> bool:
    """Whether all are linear layers with a weight alone: no bias, no hook, no adapter or quantiser in their place."""
    return all(
        type(layer) is nn.Linear and layer.bias is None and not layer._forward_hooks and not layer._forward_pre_hooks
        for layer in layers
    )
