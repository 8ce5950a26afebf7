"""Knowledge integration (Resona, section 3.1, Algorithm 3): cross-attention of each position over its chosen chunks.

Symbols
    B  batch    T  query positions    L  tokens of the memory, N chunks of U
    k  chunks a query    H  heads    d  head_dim
Each query meets k U tokens. Keys and values of the whole memory are projected once and gathered by chunk, or, when
few positions ask (decoding), only the chosen tokens are projected; the result is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lrm_recall.ops.dispatch import dispatched
from lrm_recall.resona.grouped import grouped_chunk_attention
from lrm_recall.resona.search import NO_CHUNK, take_chunks

_LONG_CHUNK = 8  # tokens from which a product by chunk is faster than gathering
_GATHERED_AT_ONCE = 1 << 26  # elements of gathered keys held at a time; above it, blocks are recomputed in backward


def attend(queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    """Attention over gathered chunks.

    Args:
        queries: [B, T, H, d].
        keys, values: [B, T, k, U, H, d], the tokens of each query's chunks.
        indices: [B, T, k] int64, NO_CHUNK where there is none.
        weights: [B, T, k] gate of each chunk, whose own softmax runs over its U tokens; None for one softmax over
            all k U tokens, as in the paper.

    Returns:
        [B, T, H, d]; zero where a query has no chunk.
    """
    logits = torch.einsum("bthd,btkuhd->bthku", queries, keys) * queries.shape[-1] ** -0.5
    absent = (indices == NO_CHUNK)[:, :, None, :, None]  # [B, T, 1, k, 1]
    if weights is None:
        # a query with no chunk at all gets a uniform softmax here and zero below, never NaN
        logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
        probs = logits.flatten(-2).softmax(dim=-1).view_as(logits)  # over k U tokens
    else:
        probs = logits.softmax(dim=-1) * weights[:, :, None, :, None]  # over the U tokens of each chunk
    probs = probs.masked_fill(absent, 0.0)
    return torch.einsum("bthku,btkuhd->bthd", probs, values)


def chunk_attention_torch(
    queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor, weights: Tensor | None
) -> Tensor:
    """`attend` over chunks that stand in a table, by chunk or in blocks of queries, so that memory stays O(T k U).

    Args:
        queries: [B, T, H, d].
        keys, values: [B, N, U, H, d], every chunk of the memory.
        indices, weights: as for `attend`.

    Returns:
        [B, T, H, d].
    """

    by_chunk = keys.shape[2] >= _LONG_CHUNK
    if by_chunk and (output := grouped_chunk_attention(queries, keys, values, indices, weights)) is not None:
        return output

    def block(q: Tensor, i: Tensor, w: Tensor | None) -> Tensor:
        return attend(q, take_chunks(keys, i), take_chunks(values, i), i, w)

    batch, length, top_k = indices.shape
    per_query = batch * top_k * keys[0, 0].numel()
    step = max(1, _GATHERED_AT_ONCE // per_query)
    if step >= length:
        return block(queries, indices, weights)
    outputs = []
    for start in range(0, length, step):
        rows = slice(start, start + step)
        gate = None if weights is None else weights[:, rows]
        outputs.append(checkpoint(block, queries[:, rows], indices[:, rows], gate, use_reentrant=False))
    return torch.cat(outputs, dim=1)


chunk_attention = dispatched("chunk_attention", chunk_attention_torch)
