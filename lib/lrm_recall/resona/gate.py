"""How much of what was retrieved a position takes: the gate over its chunks, and the mixing with the mixer's output.

B batch, T positions, D hidden size, E size of a chunk embedding, k chunks a position
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.ops.dispatch import dispatched
from lrm_recall.resona.search import NO_CHUNK


def gate_weights_torch(
    queries: Tensor, scores: Tensor, indices: Tensor, null_chunk: Tensor, log_temperature: Tensor
) -> Tensor:
    """Softmax over the k scores and the null chunk's; the weights [B, T, k] of the found chunks.

    Args:
        queries: [B, T, E] of unit length.
        scores: [B, T, k], their cosines with the chunks.
        indices: [B, T, k] int64, NO_CHUNK where there is none.
        null_chunk: [E], made unit here.
        log_temperature: no dimension; its exponential multiplies scores.
    """
    null = queries @ F.normalize(null_chunk, dim=-1)  # [B, T]
    logits = torch.cat([scores, null[..., None]], dim=-1) * log_temperature.exp()  # [B, T, k + 1]
    absent = F.pad(indices == NO_CHUNK, (0, 1))  # [B, T, k + 1]; the null chunk is always there
    weights = logits.masked_fill(absent, -torch.inf).softmax(dim=-1)[..., :-1]  # [B, T, k + 1] -> [B, T, k]
    return weights.to(queries.dtype)  # a kernel's scores are float32


def mix_retrieved_torch(mixed: Tensor, retrieved: Tensor, indices: Tensor, alpha: float | Tensor) -> Tensor:
    """alpha * mixed + (1 - alpha) * retrieved where a position found a chunk, elsewhere mixed (Algorithm 1).

    Args:
        mixed, retrieved: [B, T, D].
        indices: [B, T, k] int64, NO_CHUNK where there is none; in any order, for those found beforehand.
        alpha: a number, or [B, T, 1].
    """
    found = (indices != NO_CHUNK).any(dim=-1, keepdim=True)  # [B, T, 1]
    return torch.where(found, alpha * mixed + (1 - alpha) * retrieved, mixed)


gate_weights = dispatched("gate_weights", gate_weights_torch)
mix_retrieved = dispatched("mix_retrieved", mix_retrieved_torch)
