"""Sequences cut into chunks and joined again, for the recurrences that work on all heads side by side.

B batch, T tokens, H heads, K key channels per head, V value channels per head, X any of their channels
C tokens in a chunk, N chunks
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.ops.scan import chunk_scan


def to_chunks(x: Tensor, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, X] to [N, B, H, C, X], with zeros behind the last token."""
    T = x.shape[1]
    N = -(-T // chunk_size)
    x = F.pad(x, (0, 0, 0, 0, 0, N * chunk_size - T)).unflatten(1, (N, chunk_size))  # [B, N, C, H, X]
    return x.permute(1, 0, 3, 2, 4).to(dtype).contiguous()


def from_chunks(x: Tensor, length: int) -> Tensor:
    """[N, B, H, C, X] to [B, T, H, X]."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def tokens_behind(length: int, chunk_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many tokens each chunk has [N], and how many of them stand behind each [N, C] (0 for the filling)."""
    starts = torch.arange(0, length, chunk_size, device=device)
    lengths = (length - starts).clamp(max=chunk_size)  # [N]
    behind = lengths.unsqueeze(-1) - 1 - torch.arange(chunk_size, device=device)  # [N, C]
    return lengths, behind.clamp(min=0)


def through_states(
    o: Tensor, reads: Tensor, writes: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add to every chunk's output what it reads of the state before it.

    Args:
        o, v: [N, B, H, C, V].
        reads: [N, B, H, C, K], the queries, by what is left of the state before the chunk at each token.
        writes: [N, B, H, C, K], the keys, by what is left of each at the chunk's end.
        decay: [N, B or 1, H, K or 1, 1], of the state over the chunk.
        initial_state: [B, H, K, V], any floating dtype; None for zeros.

    Returns:
        o [N, B, H, C, V], and the state after the last chunk.
    """
    if initial_state is None:
        initial_state = v.new_zeros(*v.shape[1:3], reads.shape[-1], v.shape[-1])  # [B, H, K, V]
    states = chunk_scan(decay, writes, v, initial_state.to(v.dtype))  # [N+1, B, H, K, V]
    o = torch.baddbmm(o.flatten(0, 2), reads.flatten(0, 2), states[:-1].flatten(0, 2)).view(o.shape)
    return o, states[-1].clone()  # a view would keep the states of all chunks
