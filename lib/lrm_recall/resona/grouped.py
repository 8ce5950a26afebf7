"""Attention over chosen chunks with the choices turned round: each chunk meets the queries that chose it.

Gathering the keys and values of every query's chunks moves T k U d numbers for products of one row each. Turned round,
a chunk's keys are read once and multiplied with all its queries, as the kernel on a GPU does it (lrm_kernels).

Symbols
    B  batch    T  query positions    N  chunks of U tokens    k  chunks a query    H  heads    d  head_dim
    S  slots, the B T k choices    G  groups, the B N chunks    M  most slots of one group
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrm_recall.resona.search import NO_CHUNK

_MOST_ROOM = 8  # for queries, over their number


def grouped_chunk_attention(
    queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor, weights: Tensor | None
) -> Tensor | None:
    """As `integrate.chunk_attention`, faster where chunks are long.

    Every chunk gets room for as many queries as the most chosen one has. Memory is thus G M (U + 2 d) numbers a head,
    near S (U + 2 d) where the choices are spread evenly; None where they are not, and it would be many times that.
    """
    batch, length, num_heads, head_dim = queries.shape
    num_chunks = keys.shape[1]
    slots, groups, places, most = _group(indices, num_chunks)
    if batch * num_chunks * most > _MOST_ROOM * indices.numel():
        return None

    def spread(x: Tensor) -> Tensor:
        """[S', H, d], one row a slot with a chunk, to [G, H, M, d]."""
        table = x.new_zeros(batch * num_chunks, most, num_heads, head_dim)  # [G, M, H, d]
        return table.index_put((groups, places), x).transpose(1, 2)

    rows = slots // indices.shape[-1]  # [S'] which query each slot belongs to
    keys, values = (x.flatten(0, 1).transpose(1, 2) for x in (keys, values))  # [B, N, U, H, d] -> [G, H, U, d]
    asked = spread(queries.flatten(0, 1)[rows] * head_dim**-0.5)  # [G, H, M, d]
    logits = asked @ keys.mT  # [G, H, M, U]
    found = (logits.softmax(dim=-1) @ values).transpose(1, 2)[groups, places]  # [G, H, M, d] -> [S', H, d]
    if weights is None:
        levels = logits.logsumexp(dim=-1).transpose(1, 2)[groups, places]  # [G, H, M] -> [S', H]
        shares = levels.new_full((indices.numel(), num_heads), -torch.inf).index_put((slots,), levels)  # [S, H]
        shares = shares.unflatten(0, (-1, indices.shape[-1]))  # [B T, k, H]
        some = (indices != NO_CHUNK).any(-1).view(-1, 1, 1)  # a query without a chunk would have 0 / 0
        shares = shares.where(some, 0.0).softmax(dim=1).flatten(0, 1)[slots]  # [S', H]
    else:
        shares = weights.flatten()[slots, None]  # [S', 1]
    out = queries.new_zeros(batch * length, num_heads, head_dim)  # [B T, H, d]
    return out.index_add(0, rows, (found * shares[..., None]).to(out.dtype)).view_as(queries)


def _group(indices: Tensor, num_chunks: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The slots with a chunk [S'], in the order of their groups; group and place in it of each; M."""
    batch = indices.shape[0]
    first = torch.arange(batch, device=indices.device).view(-1, 1, 1) * num_chunks
    group = (indices + first).where(indices != NO_CHUNK, batch * num_chunks).flatten()  # [S], G where there is none
    group, slots = group.sort(stable=True)
    counts = torch.bincount(group, minlength=batch * num_chunks + 1)[:-1]  # [G]
    slots = slots[: int(counts.sum())]
    groups = group[: len(slots)]
    places = torch.arange(len(slots), device=indices.device) - (counts.cumsum(0) - counts)[groups]
    return slots, groups, places, max(1, int(counts.max()))
