"""Adapters to our own Triton kernels."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from lrm_kernels.matvec import MOST_MATRICES, MOST_ROWS, matvec
from lrm_recall.ops.beside import branch
from lrm_recall.ops.dispatch import Unsupported
from lrm_recall.ops.linear import plain

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TOP_K, _HEAD_DIM, _CHUNK_SIZE = 16, 256, 256  # the most that our kernels for Resona take
_CONV_TOKENS = 2048  # the long convolution's products grow as T^2, those of the FFTs of its torch form as T log T


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


def attention_step(q, k, v, keys, values, length, offset, *, rope_theta=None):
    from lrm_kernels.attention_step import attention_step as kernel
    from lrm_kernels.attention_step import fits

    _check_dtypes(q, k, v, keys, values)
    if reason := fits(head_dim=q.shape[-1], queries=q.shape[1] // keys.shape[1]):
        raise Unsupported(f"it takes {reason}")
    frequencies = None if rope_theta is None else _frequencies(q.shape[-1], rope_theta, q.device)
    return kernel(q, k, v, keys, values, length, offset, frequencies)


@functools.cache  # for good: a CUDA graph reads it
def _frequencies(head_dim, theta, device):
    """Radians a position that each pair of channels is rotated by, [head_dim / 2] fp32."""
    return theta ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)  # to the bit as in ops.rotary


def rwkv4(w, u, k, v, *, initial_state=None, chunk_size=64, output_final_state=True):
    from lrm_kernels.wkv import wkv as kernel

    for x in (w, u, k, v):  # each of its own: k is float32 beside a narrower v where tokens are masked
        _check_dtypes(x)
    return kernel(w, u, k, v, initial_state, output_final_state=output_final_state)


def unit_rows(x):
    from lrm_kernels.unit_rows import MOST_CHANNELS
    from lrm_kernels.unit_rows import unit_rows as kernel

    _check_dtypes(x)
    _check_most("channels a row", x.shape[-1], MOST_CHANNELS)
    return kernel(x, torch.float32 if torch.is_autocast_enabled(x.device.type) else None)  # as F.normalize gives them


def pool_chunks(tokens, place):
    from lrm_kernels.pool_chunks import pool_chunks as kernel

    autocast = torch.is_autocast_enabled(tokens.device.type)
    for x in (tokens, place):
        _check_dtypes(x)
    return kernel(tokens, place, torch.get_autocast_dtype(tokens.device.type) if autocast else None)  # as torch.einsum


def memory_norm(x, weight, eps):
    """The RMS norm of a memory [..., D] once for three readers: search, keys and values."""
    from lrm_kernels.rms_norm import MOST_CHANNELS
    from lrm_kernels.rms_norm import memory_norm as kernel

    for tensor in (x, weight):
        _check_dtypes(tensor)
    _check_most("channels a row", x.shape[-1], MOST_CHANNELS)
    return kernel(x, weight, eps)


def gate_weights(queries, scores, indices, null_chunk, log_temperature):
    from lrm_kernels.gate_weights import MOST_CHANNELS
    from lrm_kernels.gate_weights import gate_weights as kernel

    for x in (queries, scores, null_chunk, log_temperature):
        _check_dtypes(x)
    _check_most("chunks a query", indices.shape[-1], _TOP_K)
    _check_most("channels an embedding", queries.shape[-1], MOST_CHANNELS)
    return kernel(queries, scores, indices, null_chunk, log_temperature)


def mix_retrieved(mixed, retrieved, indices, alpha):
    from lrm_kernels.mix_retrieved import MOST_CHANNELS
    from lrm_kernels.mix_retrieved import mix_retrieved as kernel

    for x in (mixed, retrieved, *([alpha] if isinstance(alpha, torch.Tensor) else [])):
        _check_dtypes(x)
    _check_most("chunks a query", indices.shape[-1], _TOP_K)
    _check_most("channels a row", mixed.shape[-1], MOST_CHANNELS)
    return kernel(mixed, retrieved, indices, alpha)


def resona_step(x, mixed, layer, table, memory, length):
    """Everything of a Resona layer but its mixer, for one token: x and mixed [B, 1, D]; the result too.

    Where `lrm_recall.decode` lets it, the retrieval runs beside the mixer, on another stream.
    """
    from lrm_kernels.resona_step import Weights, encode_newest, fits, mix, retrieve

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
    tokens = (memory.ids, length, memory.offset, embed.weight)
    with branch(layer) as join:  # what the kernels cannot take was refused before
        found = retrieve(x.squeeze(1).contiguous(), table, *tokens, weights, **sizes)
        join()  # before the encoding: that is for later tokens, and nothing here has to wait for it
        encode_newest(table, *tokens, weights, chunk_size=layer.chunk_size)
    y = mix(found, mixed.squeeze(1).contiguous(), weights)  # [B, D]
    return y.unsqueeze(1)


def long_conv(x, kernel, *, outputs=None, block_size=None):
    from lrm_kernels.long_conv import long_conv as convolve
    from lrm_recall.ops.conv import long_conv_torch

    T = x.shape[1]
    if outputs == 1 or T > _CONV_TOKENS:  # a product and a sum, or FFTs
        return long_conv_torch(x, kernel, outputs=outputs, block_size=block_size)
    _check_dtypes(x)
    y = convolve(x, kernel[:T])
    return y if outputs is None else y[:, T - outputs :]


def _check_dtypes(*tensors):
    found = {tensor.dtype for tensor in tensors}
    if len(found) > 1 or not found <= set(_DTYPES):
        raise Unsupported(f"it takes one of {', '.join(map(str, _DTYPES))}, got {', '.join(map(str, found))}")


def _check_most(what, value, most):
    if value > most:
        raise Unsupported(f"it takes at most {most} {what}, got {value}")
