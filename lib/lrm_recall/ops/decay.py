"""How the chunked recurrences keep products of decays in range.

Within a chunk, token i reads token j <= i with weight exp(d[j+1] + ... + d[i]), d <= 0 the log decays, and a matrix
product needs that as (something of i) * (something of j). Split at a border m between them, both factors, the decay
over j+1..m and that over m+1..i, are at most 1, whatever the decay. So a chunk is built up by doubling: in every block
of 2s tokens the later half reads the earlier half through the border between them, with sums of decays taken within
each half alone (a difference of two long sums would lose its digits after one huge decay).

It need not start from single tokens. A leaf is a block whose whole decay is short enough for one product: with factors
exp(G[i]) and exp(-G[j]), G[i] = d[1] + ... + d[i], while they stay below exp(40), or centred on half the leaf's decay,
exp(G[i] - c) and exp(c - G[j]), which reaches twice as far. With the decays that models start from, and most that they
learn, the leaf is the whole chunk, and no doubling is left to do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(40) times any activation, and exp(-40) times any gradient, stays well within fp32.
PLAIN_LEAF, CENTRED_LEAF = -40.0, -80.0


@torch.no_grad()
def leaf_size(log_decay: Tensor, least: float) -> int:
    """The most tokens, the chunk halved until it fits, over which no log decay adds up to less than `least`.

    Args:
        log_decay: [..., C, K], C tokens in a chunk, a power of two.
    """
    C = log_decay.shape[-2]
    size = C
    while size > 1 and log_decay.unflatten(-2, (C // size, size)).sum(-2).min() < least:
        size //= 2
    return size


def centred(before: Tensor) -> Tensor:
    """G - c over a leaf [..., s, K], without its first decay, which no weight within crosses and which may be huge.

    c changes no result, so it takes no gradient: rounding would let the gradient reach tokens of the future.
    """
    before = before - before[..., :1, :]
    return before - before[..., -1:, :].detach() / 2


def decay_after(log_decay: Tensor) -> Tensor:
    """Log decay from behind each token through the last one: sums over the tokens after it, along dimension -2."""
    return F.pad(log_decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def join_halves(before: Tensor, after: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log decays of blocks of 2s tokens out of those of their halves.

    Args:
        before, after: [..., 2, s, K], from the half's start through a token, and from behind a token to its end.
        total: [..., 2, 1, K], over the half.

    Returns:
        before and after [..., 2s, K], total [..., 1, K].
    """
    before = torch.stack((before[..., 0, :, :], before[..., 1, :, :] + total[..., 0, :, :]), -3).flatten(-3, -2)
    after = torch.stack((after[..., 0, :, :] + total[..., 1, :, :], after[..., 1, :, :]), -3).flatten(-3, -2)
    return before, after, total.sum(-3)
