"""Adapters to our own Triton kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lrm_kernels.matvec import MOST_MATRICES, MOST_ROWS, matvec
from lrm_recall.ops.dispatch import Unsupported
from lrm_recall.ops.linear import plain

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TOP_K, _HEAD_DIM, _CHUNK_SIZE = 16, 256, 256  # the most that our kernels for Resona take


def linears(x, *weights):
    if torch.is_grad_enabled() or x.numel() > MOST_ROWS * x.shape[-1] or len(weights) > MOST_MATRICES:
        return [F.linear(x, weight) for weight in weights]
    return matvec(x.contiguous(), list(weights))


def chunk_search(queries, chunks, visible, top_k):
    from lrm_kernels.chunk_search import chunk_search as kernel

    _check_dtypes(queries, chunks)
    _check_most("chunks a query", top_k, _TOP_K)
    return kernel(queries, chunks, visible, top_k)


def chunk_attention(queries, keys, values, indices, weights):
    from lrm_kernels.chunk_attention import chunk_attention as kernel

    _check_dtypes(queries, keys, values)
    _check_most("chunks a query", indices.shape[-1], _TOP_K)
    _check_most("channels a head", queries.shape[-1], _HEAD_DIM)
    _check_most("tokens a chunk", keys.shape[2], _CHUNK_SIZE)
    return kernel(queries, keys, values, indices, weights)


def resona_step(x, mixed, layer, table, memory, length):
    """Everything of a Resona layer behind its mixer, for one token: x and mixed [B, 1, D]; the result too."""
    from lrm_kernels.resona_step import Weights, fits
    from lrm_kernels.resona_step import resona_step as kernel

    encoder, embed, norm = layer.encoder, memory.embed, layer.memory_norm
    linear = [encoder.chunk_proj, encoder.query_proj] if hasattr(encoder, "chunk_proj") else []
    learned, gated = layer.alpha == "learned", layer.gate == "null_chunk"
    projections = [layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj]
    if type(embed) is not nn.Embedding or embed.max_norm is not None or not plain(*projections, *linear):
        raise Unsupported("it takes plain embeddings and linear layers")
    if learned and type(layer.alpha_proj) is not nn.Linear:
        raise Unsupported("it takes a plain linear layer for alpha")
    _check_dtypes(x, mixed, table, embed.weight, *(projection.weight for projection in projections + linear))
    batch, _, hidden_size = x.shape
    sizes = {"top_k": layer.top_k, "num_heads": layer.num_heads, "chunk_size": layer.chunk_size}
    if reason := fits(rows=batch, hidden_size=hidden_size, encoder_dim=table.shape[-1], **sizes):
        raise Unsupported(f"it takes {reason}")
    weights = Weights(
        *(projection.weight for projection in projections), norm=getattr(norm, "weight", None),
        eps=getattr(norm, "eps", 0.0), place=getattr(encoder, "place", None),
        chunk=linear[0].weight if linear else None, query=linear[1].weight if linear else None,
        null=layer.null_chunk if gated else None, log_temperature=layer.log_temperature if gated else None,
        alpha=(layer.alpha_proj.weight, layer.alpha_proj.bias) if learned else float(layer.alpha),
    )  # fmt: skip
    y = kernel(x.squeeze(1).contiguous(), mixed.squeeze(1).contiguous(), table, memory.ids, length, memory.offset,
               embed.weight, weights, **sizes)  # [B, D]
    return y.unsqueeze(1)


def _check_dtypes(*tensors):
    found = {tensor.dtype for tensor in tensors}
    if len(found) > 1 or not found <= set(_DTYPES):
        raise Unsupported(f"it takes one of {', '.join(map(str, _DTYPES))}, got {', '.join(map(str, found))}")


def _check_most(what, value, most):
    if value > most:
        raise Unsupported(f"it takes at most {most} {what}, got {value}")
