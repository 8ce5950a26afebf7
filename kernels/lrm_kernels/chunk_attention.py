"""Attention of each query over its chosen chunks (Resona, section 3.1, Algorithm 3), by the chunk.

    with weights      out[t] = sum over j of w[t, j] softmax(q[t] K_j^T / sqrt(d)) V_j     a softmax over each chunk
    without           out[t] = softmax(q[t] [K_1 ... K_k]^T / sqrt(d)) [V_1 ... V_k]       one over all k U tokens

Symbols
    B  batch    T  query positions    H  heads    d  head_dim    N  chunks of U tokens    k  chunks a query
Random choices put the k U tokens of neighbouring queries all over the memory: gathered query by query they would be
read T k / N times. So the choices are turned round (chunk_groups.py), and a program that holds a chunk gathers the
queries that chose it (chunk_attention_forward.py, chunk_attention_backward.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_kernels.chunk_attention_backward import backward
from lrm_kernels.chunk_attention_forward import Selection, forward
from lrm_kernels.chunk_attention_tiles import MOST_CHANNELS

MOST_TOKENS = 256  # of a chunk
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def chunk_attention_reference(
    queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor, weights: Tensor | None = None
) -> Tensor:
    """What `chunk_attention` computes, in plain torch, all k U tokens of every query gathered at once."""
    chosen = indices.clamp(min=0)
    batch = torch.arange(len(indices), device=indices.device)[:, None, None]
    logits = torch.einsum("bthd,btkuhd->bthku", queries, keys[batch, chosen]) * queries.shape[-1] ** -0.5
    absent = (indices < 0)[:, :, None, :, None]  # [B, T, 1, k, 1]
    if weights is None:
        logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
        probs = logits.flatten(-2).softmax(dim=-1).view_as(logits)  # over k U tokens
    else:
        probs = logits.softmax(dim=-1) * weights[:, :, None, :, None]  # over the U tokens of each chunk
    return torch.einsum("bthku,btkuhd->bthd", probs.masked_fill(absent, 0.0), values[batch, chosen])


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, values, indices, weights):
        selection = Selection.of(indices, keys.shape[1])
        q, k, v = queries.flatten(0, 1).contiguous(), keys.flatten(0, 1).contiguous(), values.flatten(0, 1).contiguous()
        w = None if weights is None else weights.flatten()  # [B, T, k] -> [S]
        out, lse = forward(q, k, v, selection, w, with_lse=any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, w, selection.slots, selection.offsets, out if weights is None else None, lse)
        ctx.top_k = selection.top_k
        return out.view_as(queries)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, w, slots, offsets, out, lse = ctx.saved_tensors
        selection = Selection(slots, offsets, ctx.top_k)
        d_q, d_k, d_v, d_w = backward(d_out.flatten(0, 1).contiguous(), q, k, v, selection, w, out, lse)
        batch, length = d_out.shape[:2]
        d_k, d_v = (x.unflatten(0, (batch, -1)) for x in (d_k, d_v))  # [B N, U, H, d] -> [B, N, U, H, d]
        d_w = None if d_w is None else d_w.view(batch, length, -1)  # [S] -> [B, T, k]
        return d_q.view_as(d_out), d_k, d_v, None, d_w


def chunk_attention(
    queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Attention of each query over the chunks that it chose; differentiable, and the same in every run.

    The host never waits for the device. Beside the output, memory holds the partial results of one head at a time
    (`chunk_attention_tiles.SCRATCH_BYTES`, or B T k d elements where that is more).

    Args:
        queries: [B, T, H, d], d at most MOST_CHANNELS, in one of DTYPES; float32 is computed without tf32.
        keys, values: [B, N, U, H, d], U at most MOST_TOKENS, of the queries' dtype.
        indices: [B, T, k] int64, chunks of the query's own batch row; -1 where there is none (any number that is not
            in 0 to N - 1 counts as none: checking would mean waiting). A chunk listed twice counts twice.
        weights: [B, T, k] gate of each chunk, whose own softmax runs over its U tokens; None for one softmax over all
            k U tokens, as in the paper.

    Returns:
        [B, T, H, d]; exactly zero where a query has no chunk.

    Raises:
        ValueError: shapes that do not fit together, a dtype or a size that the kernels do not take.
    """
    _check(queries, keys, values, indices, weights)
    return _ChunkAttention.apply(queries, keys, values, indices, weights)


def _check(queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor, weights: Tensor | None) -> None:
    if queries.dim() != 4 or keys.dim() != 5 or indices.dim() != 3:
        raise ValueError("queries, keys and indices must have 4, 5 and 3 dimensions, got "
                         f"{queries.dim()}, {keys.dim()} and {indices.dim()}")
    (batch, length, heads, head_dim), (chunks, tokens) = queries.shape, keys.shape[1:3]
    expected = {
        "keys": (keys, (batch, chunks, tokens, heads, head_dim)),
        "values": (values, tuple(keys.shape)),
        "indices": (indices, (batch, length, indices.shape[2])),
    }
    if weights is not None:
        expected["weights"] = (weights, tuple(indices.shape))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have the shape {list(shape)} beside queries {list(queries.shape)}, "
                             f"got {list(tensor.shape)}")
    if min(*queries.shape, *keys.shape, *indices.shape) < 1:
        raise ValueError(f"no dimension may be empty, got queries {list(queries.shape)}, keys {list(keys.shape)}, "
                         f"indices {list(indices.shape)}")
    if queries.dtype not in DTYPES or keys.dtype != queries.dtype or values.dtype != queries.dtype:
        raise ValueError(f"queries, keys and values must share one dtype of {', '.join(map(str, DTYPES))}, got "
                         f"{queries.dtype}, {keys.dtype} and {values.dtype}")
    if indices.dtype != torch.int64:
        raise ValueError(f"indices must be torch.int64, got {indices.dtype}")
    if head_dim > MOST_CHANNELS or tokens > MOST_TOKENS:
        raise ValueError(f"a head may have at most {MOST_CHANNELS} channels and a chunk {MOST_TOKENS} tokens, "
                         f"got {head_dim} and {tokens}")
