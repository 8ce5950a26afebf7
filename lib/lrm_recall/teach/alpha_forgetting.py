"""A state that forgets: key-value pairs written one by one into one GLA head, and the first one read back.

    S_n = g S_(n-1) + k_n v_n^T        read(k_1) = k_1^T S_n

Symbols
    K  key channels    V  value channels    g  decay in (0, 1]    n  pairs written    R  random draws
With unit keys in random directions, (k_1 . k_j)^2 has mean 1 / K, so the error of the first pair, relative to |v_1|,
has the mean square
    (1 - g^(n-1))^2 + (1 - g^(2(n-1))) / (1 - g^2) / K        (the last quotient is n - 1 at g = 1)
the first term being decay, the second the other pairs, which lie in the same K rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lrm_recall.ops.gla import gla_step


@dataclass(frozen=True)
class Forgetting:
    """What becomes of the first pair.

    Attributes:
        states: [n, K, V] the state of the first draw after each pair.
        stored: [V] the first value of that draw; recalled: [n, V] what the first key reads after each pair.
        errors: [n] root mean square over all draws of |recalled - stored| / |stored|.
        expected: [n] the same by the formula above.
        decay: g.
    """

    states: np.ndarray
    stored: np.ndarray
    recalled: np.ndarray
    errors: np.ndarray
    expected: np.ndarray
    decay: float


def forget(pairs: int = 48, d_key: int = 16, d_value: int = 16, decay: float = 1.0, draws: int = 256,
           seed: int = 0) -> Forgetting:
    """Write `pairs` random pairs with the library's own GLA step and read the first one after each.

    Raises:
        ValueError: a size below 1, or a decay outside (0, 1].
    """
    for name, value in (("pairs", pairs), ("d_key", d_key), ("d_value", d_value), ("draws", draws)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must lie in (0, 1], got {decay}")
    generator = torch.Generator().manual_seed(seed)
    keys = F.normalize(torch.randn(draws, pairs, 1, d_key, generator=generator), dim=-1)  # [R, n, 1, K]
    values = F.normalize(torch.randn(draws, pairs, 1, d_value, generator=generator), dim=-1)  # [R, n, 1, V]
    log_decay = torch.full((draws, 1, d_key), math.log(decay))  # [R, 1, K]
    state, first = torch.zeros(draws, 1, d_key, d_value), keys[:, 0]  # [R, 1, K, V], [R, 1, K]
    states, reads = [], []
    for step in range(pairs):
        read, state = gla_step(first, keys[:, step], values[:, step], log_decay, state, scale=1.0)
        states.append(state[0, 0])
        reads.append(read[:, 0])  # [R, V]
    recalled = torch.stack(reads, dim=1)  # [R, n, V]
    errors = (recalled - values[:, :1, 0]).norm(dim=-1).square().mean(dim=0).sqrt()  # [n]; |v_1| is 1
    return Forgetting(torch.stack(states).numpy(), values[0, 0, 0].numpy(), recalled[0].numpy(), errors.numpy(),
                      expected_error(pairs, d_key, decay), decay)


def expected_error(pairs: int, d_key: int, decay: float) -> np.ndarray:
    """The formula in this module's docstring for 1 to `pairs` pairs: [pairs]."""
    later = np.arange(pairs)  # pairs written after the first
    others = later if decay == 1 else (1 - decay ** (2 * later)) / (1 - decay**2)
    return np.sqrt((1 - decay**later) ** 2 + others / d_key)
