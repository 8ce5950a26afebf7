"""The time steps of Mamba's recurrences."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def time_steps(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    """dt itself, or where a bias of its last dimension is given softplus(dt + dt_bias), in fp32."""
    return dt if dt_bias is None else F.softplus(dt.float() + dt_bias.float())
