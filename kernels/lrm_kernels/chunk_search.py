"""The k chunks of largest inner product with each query, among the leading ones that it may see, with their scores.

Symbols
    B  batch    T  queries    N  chunks    E  size of an embedding    k  top_k
A program takes BLOCK_T queries and walks over the chunks that they may see, BLOCK_N at a time. Scores live in
registers: after each product the best of them move, one a round, into the k kept so far, so no T x N matrix exists.
A kept score and its index are one 64-bit key: the score's bits, in an order in which they compare as integers, above
the index counted down. Keys are never equal, the larger score wins, and of equal scores the lower index.

Backward needs no scores either: a query's gradient is gathered from its k chunks; a chunk's is a product of a block of
gradients, spread over the chunks in registers, with the queries. No atomics: results are the same in every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_kernels.column_sums import column_sums

MOST_CHOSEN = 16  # top_k
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_NONE = -1  # index of a chunk that was not found
_STOP_EARLY_FROM = 8  # top_k from which a test after each round costs less than the rounds that it saves
_PROGRAMS = 512  # that the gradient of the chunks is spread over, a few for each processor of a GPU

_LAST = tl.constexpr(0x7FFFFFFF)  # the largest 32-bit integer
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Tiles(NamedTuple):
    """How the search is cut into programs."""

    block_t: int  # queries of a program
    block_n: int  # chunks whose scores are held at a time
    block_e: int  # channels of a product; where it holds all E the queries are read once
    num_warps: int
    num_stages: int
    stop_early: bool  # end the rounds of a block when no query finds anything better


def tiles(dtype: torch.dtype, E: int, top_k: int) -> Tiles:
    """What `chunk_search` takes unless told otherwise."""
    stop_early = top_k >= _STOP_EARLY_FROM
    if dtype == torch.float32:  # products in full fp32 take many registers
        return Tiles(64, 32, max(16, min(triton.next_power_of_2(E), 32)), 4, 2, stop_early)
    if E <= 128:
        return Tiles(64, 64, max(16, triton.next_power_of_2(E)), 4, 2, stop_early)
    return Tiles(128, 128, 64, 8, 3, stop_early)  # queries are read again for each block of chunks


def chunk_search_reference(queries: Tensor, chunks: Tensor, visible: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What `chunk_search` computes, in plain torch and with all T x N scores."""
    N = chunks.shape[1]
    scores = torch.einsum("bte,bne->btn", queries.float(), chunks.float())  # [B, T, N]
    seen = (torch.arange(N, device=queries.device) < visible[..., None]) & (scores > -torch.inf)  # [B, T, N]
    scores = scores.masked_fill(~seen, -torch.inf)
    indices = scores.argsort(dim=-1, descending=True, stable=True)[..., :top_k]  # [B, T, min(k, N)]
    best = scores.gather(-1, indices)  # [B, T, min(k, N)]
    found = best > -torch.inf
    missing = (0, max(0, top_k - N))
    return F.pad(indices.masked_fill(~found, _NONE), missing, value=_NONE), F.pad(best.where(found, 0.0), missing)


@triton.jit
def _ordered(bits):
    """Bits of an fp32 number to an int32 that compares like it, and back."""
    return bits ^ ((bits >> 31) & _LAST)


@triton.jit
def _key(score, index):
    """The larger, the better: by score, then by lower index. Zero may not be negative."""
    return (_ordered(score.to(tl.int32, bitcast=True)).to(tl.int64) << 32) + (_LAST - index.to(tl.int64))


@triton.jit
def _score(key):
    return _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _index(key):
    return _LAST - (key & 0xFFFFFFFF)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, of operands in one dtype."""
    if _INTERPRETED:  # the interpreter multiplies the bits of bf16; in fp32 each product is the same
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _take(scores, top, columns, kept):
    """Move each row's largest score `top` [BLOCK_T] from scores [BLOCK_T, BLOCK_N] to the place of the worst kept."""
    at = tl.min(tl.where(scores == top[:, None], columns[None, :], _LAST), axis=1)  # of equal ones the first
    scores = tl.where(columns[None, :] == at[:, None], -float("inf"), scores)
    worst = tl.min(kept, axis=1)
    better = tl.maximum(_key(tl.where(top == 0.0, 0.0, top), at), worst)
    return scores, tl.where(kept == worst[:, None], better[:, None], kept)


@triton.jit(do_not_specialize=["T", "N", "stride_vb"])
def _search_kernel(
    queries, chunks, visible, indices, scores, T, N,
    stride_qb, stride_qt, stride_cb, stride_cn, stride_vb, stride_vt,
    E: tl.constexpr, TOP_K: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
    STOP_EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most: the longest programs start first
    batch = tl.program_id(1).to(tl.int64)
    rows = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < T
    seen = tl.load(visible + batch * stride_vb + rows * stride_vt, mask=inside, other=0)
    seen = tl.minimum(seen, N).to(tl.int32)  # [BLOCK_T]
    channels = tl.arange(0, BLOCK_E)
    place_q = queries + batch * stride_qb + rows[:, None] * stride_qt + channels[None, :]
    place_c = chunks + batch * stride_cb + channels[:, None]
    if BLOCK_E >= E:
        q = tl.load(place_q, mask=inside[:, None] & (channels < E)[None, :], other=0.0)  # [BLOCK_T, BLOCK_E]
    slots = tl.arange(0, KEPT)
    # nothing yet: keys that all differ and lie below those of every score, with indices below zero
    kept = _key(tl.full([BLOCK_T, KEPT], -float("inf"), tl.float32), -1 - slots[None, :])
    for start in tl.range(0, tl.max(seen, axis=0), BLOCK_N, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK_N)
        there = columns < N
        column_c = place_c + columns.to(tl.int64)[None, :] * stride_cn
        found = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
        if BLOCK_E >= E:
            c = tl.load(column_c, mask=there[None, :] & (channels < E)[:, None], other=0.0)  # [BLOCK_E, BLOCK_N]
            found = _dot(q, c, found, PRECISION)
        else:
            for first in range(0, E, BLOCK_E):
                here = channels < E - first
                q = tl.load(place_q + first, mask=inside[:, None] & here[None, :], other=0.0)
                c = tl.load(column_c + first, mask=there[None, :] & here[:, None], other=0.0)
                found = _dot(q, c, found, PRECISION)
        # NaN is not above -inf either: it is never chosen
        found = tl.where((columns[None, :] < seen[:, None]) & (found > -float("inf")), found, -float("inf"))
        if STOP_EARLY:
            # blocks come in order, so a score that only equals the worst kept has the higher index and stays out
            top = tl.max(found, axis=1)
            while tl.max((top > _score(tl.min(kept, axis=1))).to(tl.int32), axis=0) > 0:
                found, kept = _take(found, top, columns, kept)
                top = tl.max(found, axis=1)
        else:
            for _ in tl.static_range(TOP_K):
                found, kept = _take(found, tl.max(found, axis=1), columns, kept)
    kept = tl.sort(kept, descending=True)
    index = tl.maximum(_index(kept), -1)
    place = (batch * T + rows)[:, None] * TOP_K + slots[None, :]
    wanted = inside[:, None] & (slots < TOP_K)[None, :]
    tl.store(indices + place, index, mask=wanted)
    tl.store(scores + place, tl.where(index < 0, 0.0, _score(kept)), mask=wanted)


@triton.jit(do_not_specialize=["T"])
def _d_queries_kernel(
    d_scores, indices, chunks, d_queries, T, stride_cb, stride_cn,
    E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside, there = rows < T, channels < E
    total = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        place = (batch * T + rows) * TOP_K + slot
        at = tl.load(indices + place, mask=inside, other=-1)
        weight = tl.load(d_scores + place, mask=inside, other=0.0)
        chunk = tl.load(chunks + batch * stride_cb + at[:, None] * stride_cn + channels[None, :],
                        mask=(at >= 0)[:, None] & there[None, :], other=0.0)  # [BLOCK_T, BLOCK_E]
        total += weight[:, None] * chunk.to(tl.float32)
    tl.store(d_queries + (batch * T + rows)[:, None] * E + channels[None, :], total.to(d_queries.dtype.element_ty),
             mask=inside[:, None] & there[None, :])


@triton.jit(do_not_specialize=["T", "N", "splits"])
def _d_chunks_kernel(
    d_scores, indices, queries, d_chunks, T, N, splits, stride_qb, stride_qt,
    E: tl.constexpr, TOP_K: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    first = (tl.program_id(0) // splits) * BLOCK_N
    batch = tl.program_id(2).to(tl.int64)
    columns = first + tl.arange(0, BLOCK_N)
    channels = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    slots = tl.arange(0, KEPT)
    total = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    for start in range(split * BLOCK_T, T, splits * BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = rows < T
        place = (batch * T + rows) * TOP_K
        chosen = tl.load(indices + place[:, None] + slots[None, :],
                         mask=inside[:, None] & (slots < TOP_K)[None, :], other=-1)  # [BLOCK_T, KEPT]
        near = tl.max(((chosen >= first) & (chosen < first + BLOCK_N)).to(tl.int32), axis=1)  # [BLOCK_T]
        if tl.max(near, axis=0) > 0:  # some query chose one of these chunks
            weights = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
            for slot in tl.static_range(TOP_K):
                at = tl.load(indices + place + slot, mask=inside, other=-1).to(tl.int32)
                d_score = tl.load(d_scores + place + slot, mask=inside, other=0.0)
                weights = tl.where(columns[:, None] == at[None, :], d_score[None, :], weights)  # a chunk once a query
            q = tl.load(queries + batch * stride_qb + rows[:, None] * stride_qt + channels[None, :],
                        mask=(near > 0)[:, None] & (channels < E)[None, :], other=0.0)  # [BLOCK_T, BLOCK_E]
            total = _dot(weights.to(q.dtype), q, total, PRECISION)
    place = ((split.to(tl.int64) * tl.num_programs(2) + batch) * N + columns)[:, None] * E + channels[None, :]
    tl.store(d_chunks + place, total, mask=(columns < N)[:, None] & (channels < E)[None, :])


def search_forward(
    queries: Tensor, chunks: Tensor, visible: Tensor, top_k: int, sizes: Tiles
) -> tuple[Tensor, Tensor]:
    """The kernel of `chunk_search` alone: no checks, no gradients; `bench/gpu_chunk_search.py` tries `sizes`."""
    (B, T, E), N = queries.shape, chunks.shape[1]
    if N == 0 or queries.numel() == 0:
        return visible.new_full((B, T, top_k), _NONE), queries.new_zeros(B, T, top_k, dtype=torch.float32)
    indices = visible.new_empty(B, T, top_k)
    scores = queries.new_empty(B, T, top_k, dtype=torch.float32)
    visible = visible.expand(B, T)
    _search_kernel[(triton.cdiv(T, sizes.block_t), B)](
        queries, chunks, visible, indices, scores, T, N,
        *queries.stride()[:2], *chunks.stride()[:2], *visible.stride(),
        E=E, TOP_K=top_k, KEPT=triton.next_power_of_2(top_k),
        BLOCK_T=sizes.block_t, BLOCK_N=sizes.block_n, BLOCK_E=sizes.block_e, STAGES=sizes.num_stages,
        STOP_EARLY=sizes.stop_early, PRECISION=_precision(queries),
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    return indices, scores


def _d_queries(d_scores: Tensor, indices: Tensor, queries: Tensor, chunks: Tensor) -> Tensor:
    """Each query's gradient [B, T, E]: its chunks, weighted by the gradients of their scores."""
    B, T, E = queries.shape
    d_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    block_t, block_e = 16, min(128, triton.next_power_of_2(E))
    _d_queries_kernel[(triton.cdiv(T, block_t), triton.cdiv(E, block_e), B)](
        d_scores, indices, chunks, d_queries, T, *chunks.stride()[:2],
        E=E, TOP_K=indices.shape[-1], BLOCK_T=block_t, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return d_queries


def _d_chunks(d_scores: Tensor, indices: Tensor, queries: Tensor, chunks: Tensor) -> Tensor:
    """Each chunk's gradient [B, N, E]: the queries that chose it, weighted likewise."""
    (B, T, E), N, top_k = queries.shape, chunks.shape[1], indices.shape[-1]
    block_t, block_n = (32, 32) if queries.dtype == torch.float32 else (64, 64)
    block_e = max(16, min(triton.next_power_of_2(E), 64 if queries.dtype == torch.float32 else 128))
    programs = triton.cdiv(N, block_n) * triton.cdiv(E, block_e) * B
    splits = max(1, min(triton.cdiv(T, block_t), _PROGRAMS // max(1, programs)))
    parts = queries.new_empty(splits, B, N, E, dtype=torch.float32)  # added up in order, so always the same
    _d_chunks_kernel[(triton.cdiv(N, block_n) * splits, triton.cdiv(E, block_e), B)](
        d_scores, indices, queries, parts, T, N, splits, *queries.stride()[:2],
        E=E, TOP_K=top_k, KEPT=triton.next_power_of_2(top_k), BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_E=block_e,
        PRECISION=_precision(queries), num_warps=8,
    )  # fmt: skip
    return column_sums(parts.flatten(1), chunks.dtype).view(B, N, E)  # [S, B N E] -> [B, N, E]


class _ChunkSearch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, chunks, visible, top_k):
        indices, scores = search_forward(
            queries, chunks, visible, top_k, tiles(queries.dtype, queries.shape[-1], top_k)
        )
        ctx.save_for_backward(queries, chunks, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return indices, scores

    @staticmethod
    @once_differentiable
    def backward(ctx, _, d_scores):
        if d_scores is None:
            return None, None, None, None
        queries, chunks, indices = ctx.saved_tensors
        given = (d_scores.contiguous(), indices, queries, chunks)
        d_queries = _d_queries(*given) if ctx.needs_input_grad[0] else None
        d_chunks = _d_chunks(*given) if ctx.needs_input_grad[1] else None
        return d_queries, d_chunks, None, None


def chunk_search(queries: Tensor, chunks: Tensor, visible: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k visible chunks of largest inner product with each query, best first; of equal ones the first.

    Contextual search of Resona (section 3.1, Algorithm 2) under its causal rule (section 3.2). With embeddings of unit
    length the scores are cosines. Products add up in fp32; of fp32 embeddings they are taken in full fp32.

    Args:
        queries: [B, T, E] float32, float16 or bfloat16.
        chunks: [B, N, E], of the same dtype; N may be 0.
        visible: [B, T] or [1, T] int64: query t may choose among the chunks 0 to visible[t] - 1.
        top_k: k, from 1 to MOST_CHOSEN.

    Returns:
        indices: [B, T, k] int64, -1 where fewer than k chunks are visible. A score of NaN or -inf is never chosen.
        scores: [B, T, k] float32, as they were added up; 0 where the index is -1. Differentiable with respect to
            queries and chunks; the choice itself is not. Gradients are the same in every run.

    Raises:
        ValueError: shapes that do not fit, a dtype that is not taken, or top_k out of its range.
    """
    _check(queries, chunks, visible, top_k)
    queries, chunks = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, chunks))
    return _ChunkSearch.apply(queries, chunks, visible, top_k)


def _precision(x: Tensor) -> str:
    """Of products: fp32 in full, never as TF32; for the 16-bit types there is only one."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _check(queries: Tensor, chunks: Tensor, visible: Tensor, top_k: int) -> None:
    if not 1 <= top_k <= MOST_CHOSEN:
        raise ValueError(f"top_k must lie in 1 to {MOST_CHOSEN}, got {top_k}")
    if queries.dim() != 3 or chunks.dim() != 3 or queries.shape[::2] != chunks.shape[::2]:
        raise ValueError(f"queries [B, T, E] and chunks [B, N, E] must agree in B and E, got {tuple(queries.shape)} "
                         f"and {tuple(chunks.shape)}")
    if queries.dtype not in DTYPES or chunks.dtype != queries.dtype:
        raise ValueError("queries and chunks must both be float32, float16 or bfloat16, "
                         f"got {queries.dtype} and {chunks.dtype}")
    (B, T, _) = queries.shape
    if visible.dtype != torch.int64 or visible.shape not in ((B, T), (1, T)):
        raise ValueError(f"visible must be int64 of shape {(B, T)} or {(1, T)}, "
                         f"got {visible.dtype} of shape {tuple(visible.shape)}")
