"""The second half of a SwiGLU, from the gate on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lrm_recall.ops.dispatch import dispatched


def swiglu_linear_torch(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) weight^T: gate and up [..., F], weight [D, F], result [..., D]."""
    return F.linear(F.silu(gate) * up, weight)


swiglu_linear = dispatched("swiglu_linear", swiglu_linear_torch)
