"""One token of Resona's retrieval: search the chunks, attend to the k best, mix with what the mixer gave.

Keys and values of the k U tokens that one query meets need never be made. With n_j the normalised embedding of token j,

    q_h . K_h n_j          = (K_h^T q_h) . n_j           one vector a head, met by the embeddings themselves
    sum_j p_j V_h n_j      = V_h (sum_j p_j n_j)         the embeddings are added up first

so that each of the four matrices is read once, as the bytes demand, and nothing is written but a few vectors. What is
left is k U rows of the embedding table. In six launches:

    q = W_q x, and the query of the search           `matvec`
    t_h = K_h^T q_h; the best chunks of each block   `_score_kernel`
    the k best of all; their tokens' logits          `_logit_kernel`
    softmax, gate, sum of the tokens                 `_token_kernel`
    o_h = V_h of that sum                            `_value_kernel`
    y = alpha * mixed + (1 - alpha) W_o o            `_mix_kernel`

and a seventh, `_encode_kernel`, which returns at once unless the new token completes a chunk. Only the sixth needs what
the mixer gave, and nothing of the same token needs the seventh, so that these are three functions: `retrieve` may run
beside the mixer, `mix` behind both, and `encode_newest` whenever there is time before the next token.

Symbols
    B  rows, each with one new token    D  hidden size    H  heads    d  head_dim = D / H
    C  columns of ids    U  chunk_size    N  slots of the table    E  size of a chunk embedding    k  top_k
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lrm_kernels.matvec import MOST_ROWS, matvec, warps

MOST_CHUNKS = 16  # k
MOST_TOKENS = 256  # U
MOST_HEADS = 64
MOST_LOGITS = 8192  # H U, each up to a power of two
MOST_CHANNELS = 8192  # D and E

_PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}  # of tl.dot: that of the dtype
_NONE = -1  # index of a chunk that was not found
_KEYS, _KEY_COLUMNS, _LEAST_COLUMNS = 8192, 64, 16  # elements of the key matrix held at a time, columns in a program
_KEY_PROGRAMS = 128  # narrower columns for few heads, so that there are as many
_SEARCHED = 32768  # elements of the table of chunk embeddings in a program
_LOGIT_TOKENS, _LOGIT_BYTES = 16, 1024  # tokens in a program, and bytes of each: logits
_LOGITS = 4096  # held by four warps
_TOKEN_CHANNELS = 64  # channels of a program: sum of the tokens
_ROWS, _COLUMNS = 2, 2048  # tile of the value and output matrices in a program, as in matvec
_ENCODED = 8192  # elements of embeddings held at a time while a chunk is encoded


class Weights(NamedTuple):
    """Parameters of a Resona layer, all of x's dtype.

    Attributes:
        q, k, v, o: [D, D] projections.
        norm: [D] weight of the memory's RMSNorm, None for none; eps: what is added to the mean square.
        place: [U, D] weights by place in a chunk, None for its mean.
        chunk, query: [E, D] maps of the linear encoder; None, and E = D, for the others.
        null, log_temperature: [E] and [] of the gate, None for one softmax over all tokens.
        alpha: weight of the mixer's own output: a number, or weight [1, D] and bias [1] of the map whose sigmoid it is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm: Tensor | None
    eps: float
    place: Tensor | None
    chunk: Tensor | None
    query: Tensor | None
    null: Tensor | None
    log_temperature: Tensor | None
    alpha: float | tuple[Tensor, Tensor]


class Retrieved(NamedTuple):
    """What `retrieve` leaves for `mix`.

    Attributes:
        o: [B, D] fp32, the heads' outputs, not yet projected.
        chosen: [B, k] int32, the chunks, best first; -1 where there is none.
        alpha_logit: [B, 1] of x's dtype, the learned map of x without its bias; None for a constant alpha.
    """

    o: Tensor
    chosen: Tensor
    alpha_logit: Tensor | None


def resona_step_reference(
    x: Tensor, mixed: Tensor, table: Tensor, ids: Tensor, length: Tensor, offset: Tensor, embedding: Tensor,
    weights: Weights, *, top_k: int, num_heads: int, chunk_size: int,
) -> Tensor:  # fmt: skip
    """What `retrieve`, `mix` and `encode_newest` compute together, in plain torch with keys and values written out; the
    table is changed in place."""
    w, (batch, capacity) = weights, ids.shape
    positions = length - offset  # [B]

    def tokens(chunks: Tensor) -> Tensor:
        """Normalised embeddings [B, n, U, D] of chunks [B, n]."""
        columns = chunks.clamp(min=0)[..., None] * chunk_size + torch.arange(chunk_size, device=ids.device)
        columns = (columns + offset[:, None, None]).clamp(max=capacity - 1).flatten(1)  # [B, n U]
        e = embedding[ids.gather(1, columns)].float()  # [B, n U, D]
        if w.norm is not None:
            e = e * torch.rsqrt(e.square().mean(-1, keepdim=True) + w.eps) * w.norm.float()
        return e.unflatten(1, (-1, chunk_size))

    newest = (positions // chunk_size)[:, None]  # [B, 1]
    pooled = tokens(newest)[:, 0]  # [B, U, D]
    pooled = (pooled if w.place is None else pooled * w.place.float()).sum(1)  # [B, D]
    pooled = F.normalize(pooled if w.chunk is None else pooled @ w.chunk.float().T, dim=-1)  # [B, E]
    complete = (positions + 1) % chunk_size == 0  # [B]
    rows = torch.arange(batch, device=ids.device)
    table[rows[complete], newest[complete, 0]] = pooled[complete].to(table.dtype)

    query = F.normalize(x.float() if w.query is None else x.float() @ w.query.float().T, dim=-1)  # [B, E]
    scores = torch.einsum("be,bne->bn", query, table.float())
    hidden = torch.arange(table.shape[1], device=ids.device) >= newest  # [B, N]
    best, chunks = scores.masked_fill(hidden, -torch.inf).topk(min(top_k, table.shape[1]), dim=-1)  # [B, k]
    absent = best == -torch.inf
    q = (x.float() @ w.q.float().T).unflatten(-1, (num_heads, -1))  # [B, H, d]
    e = tokens(chunks.masked_fill(absent, _NONE))  # [B, k, U, D]
    keys, values = ((e @ p.float().T).unflatten(-1, (num_heads, -1)) for p in (w.k, w.v))  # [B, k, U, H, d]
    logits = torch.einsum("bhd,bkuhd->bhku", q, keys) * q.shape[-1] ** -0.5
    absent = absent[:, None, :, None]  # [B, 1, k, 1]
    if w.null is None:
        logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
        probs = logits.flatten(2).softmax(-1).view_as(logits)
    else:
        gate = torch.cat([best, (query @ F.normalize(w.null.float(), dim=-1))[:, None]], 1) * w.log_temperature.exp()
        probs = logits.softmax(-1) * gate.float().softmax(-1)[:, None, :-1, None]
    o = torch.einsum("bhku,bkuhd->bhd", probs.masked_fill(absent, 0), values).flatten(1)  # [B, D]
    alpha = w.alpha
    if not isinstance(alpha, float):
        alpha = (x.float() @ alpha[0].float().T + alpha[1].float()).sigmoid()  # [B, 1]
    y = alpha * mixed.float() + (1 - alpha) * (o @ w.o.float().T)
    return torch.where(newest > 0, y, mixed.float()).to(x.dtype)


@triton.jit
def _token_ids(ids, offset, row, chunk, place, valid, C, U: tl.constexpr):
    """Ids of the tokens at these places of a chunk."""
    column = tl.minimum(chunk * U + place + tl.load(offset + row), C - 1)
    return tl.load(ids + row * C + column, mask=valid, other=0)


@triton.jit
def _head_vector(
    q, w_k, norm, t, row, program, scale, stride_q,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The transposed key matrix of one head times its query: BLOCK_D channels."""
    H: tl.constexpr = D // HEAD
    head, block = program % H, program // H
    columns = block * BLOCK_D + tl.arange(0, BLOCK_D)
    here = columns < D
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in tl.static_range(0, HEAD, BLOCK_R):
        inside_head = start + tl.arange(0, BLOCK_R)
        inside = inside_head < HEAD
        rows = head * HEAD + inside_head
        a = tl.load(w_k + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=inside[:, None] & here[None, :],
                    other=0.0)  # [BLOCK_R, BLOCK_D]
        value = tl.load(q + row * stride_q + rows, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_R]
        total += tl.sum(a.to(tl.float32) * value[:, None], axis=0)
    total *= scale
    if NORM:
        total *= tl.load(norm + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(t + (row * H + head) * D + columns, total, mask=here)


@triton.jit
def _best_chunks(
    query, table, best, best_at, row, block, blocks, visible, unit, N,
    E: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The K best of BLOCK_N chunks, best first; -inf where fewer are visible."""
    chunks = block * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = (chunks < visible) & (chunks < N)
    dots = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in tl.static_range(0, E, BLOCK_E):
        at = start + tl.arange(0, BLOCK_E)
        v = tl.load(query + at, mask=at < E, other=0.0).to(tl.float32)  # [BLOCK_E]
        c = tl.load(table + (row * N + chunks)[:, None] * E + at[None, :], mask=seen[:, None] & (at < E)[None, :],
                    other=0.0)  # [BLOCK_N, BLOCK_E]
        dots += tl.sum(c.to(tl.float32) * v[None, :], axis=1)
    scores = dots * unit
    scores = tl.where(seen & (scores == scores), scores, float("-inf"))  # NaN finds nothing
    for i in tl.static_range(K):
        top = tl.max(scores, axis=0)
        first = tl.min(tl.where(scores == top, chunks, N), axis=0)
        place = (row * blocks + block) * K + i
        tl.store(best + place, top)
        tl.store(best_at + place, first)
        scores = tl.where(chunks == first, float("-inf"), scores)


@triton.jit
def _product(a, b, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Inner product of two vectors, in fp32."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(a + at, mask=at < SIZE, other=0.0).to(tl.float32)
        total += x * tl.load(b + at, mask=at < SIZE, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit
def _unit(a, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """What brings a vector to unit length."""
    return 1 / tl.maximum(tl.sqrt(_product(a, a, SIZE, BLOCK)), 1e-12)


@triton.jit
def _store_cosine(a, b, to, wanted, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    if wanted:
        tl.store(to, _product(a, b, SIZE, BLOCK) * _unit(a, SIZE, BLOCK) * _unit(b, SIZE, BLOCK))


@triton.jit
def _score_kernel(
    q, w_k, norm, t, query, table, null, best, best_at, null_score, length, offset,
    scale, stride_q, stride_query, N,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    E: tl.constexpr, U: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    NORM: tl.constexpr, NULL: tl.constexpr, KEY_PROGRAMS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if program < KEY_PROGRAMS:
        _head_vector(q, w_k, norm, t, row, program, scale, stride_q, D, HEAD, BLOCK_R, BLOCK_D, NORM)
    else:
        block, blocks = program - KEY_PROGRAMS, tl.num_programs(0) - KEY_PROGRAMS
        query += row * stride_query
        visible = tl.maximum(tl.load(length) - tl.load(offset + row), 0) // U
        unit = _unit(query, E, BLOCK_E)
        _best_chunks(query, table, best, best_at, row, block, blocks, visible, unit, N, E, K, BLOCK_N, BLOCK_E)
        if NULL:
            _store_cosine(query, null, null_score + row, block == 0, E, BLOCK_E)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a b, of a in fp32 and b in the dtype of the model."""
    if PRECISION == "bf16":
        result = tl.dot(a.to(tl.bfloat16), b)
    else:
        result = tl.dot(a, b.to(tl.float32), input_precision=PRECISION)
    return result


@triton.jit
def _logit_kernel(
    t, best, best_at, ids, offset, embedding, chosen, scores, logits, squares, C, N,
    D: tl.constexpr, H: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
    CANDIDATES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKEN_BLOCKS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Of one chosen chunk, BLOCK_T tokens and BLOCK_D channels: what the channels add to the logits of every head.
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    part, block, slot = program % PARTS, (program // PARTS) % TOKEN_BLOCKS, program // (PARTS * TOKEN_BLOCKS)
    candidate = tl.arange(0, BLOCK_C)
    there = candidate < CANDIDATES
    value = tl.load(best + row * CANDIDATES + candidate, mask=there, other=float("-inf"))
    place = tl.load(best_at + row * CANDIDATES + candidate, mask=there, other=0)
    score = tl.max(value, axis=0)
    chunk = tl.min(tl.where(value == score, place, N), axis=0)
    for i in tl.static_range(1, K):
        value = tl.where(place == tl.where(i <= slot, chunk, -1), float("-inf"), value)
        score = tl.max(value, axis=0)
        chunk = tl.min(tl.where(value == score, place, N), axis=0)
    chunk = tl.where(score == float("-inf"), -1, chunk)
    if (block == 0) & (part == 0):
        tl.store(chosen + row * K + slot, chunk)
        tl.store(scores + row * K + slot, score)

    u = block * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = u < tl.where(chunk >= 0, U, 0)
    token = _token_ids(ids, offset, row, chunk, u, valid, C, U)  # [BLOCK_T]
    columns = part * BLOCK_D + tl.arange(0, BLOCK_D)
    here = columns < D
    e = tl.load(embedding + token[:, None] * D + columns[None, :], mask=valid[:, None] & here[None, :], other=0.0)
    heads = tl.arange(0, BLOCK_H)
    vectors = tl.load(t + (row * H + heads)[:, None] * D + columns[None, :],
                      mask=(heads < H)[:, None] & here[None, :], other=0.0)  # [BLOCK_H, BLOCK_D]
    result = _dot(vectors, tl.trans(e), PRECISION)  # [BLOCK_H, BLOCK_T]
    at = row * PARTS + part
    tl.store(logits + (at * H + heads)[:, None] * (K * U) + (slot * U + u)[None, :], result,
             mask=(heads < H)[:, None] & (u < U)[None, :])
    e = e.to(tl.float32)
    tl.store(squares + at * (K * U) + slot * U + u, tl.sum(e * e, axis=1), mask=u < U)


@triton.jit
def _token_kernel(
    chosen, scores, null_score, log_temperature, logits, squares, ids, offset, embedding, norm, mean, eps, C,
    D: tl.constexpr, H: tl.constexpr, U: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # BLOCK_D channels of every head's weighted sum of the chosen chunks' normalised embeddings.
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(1).to(tl.int64)
    here = columns < D
    heads, u = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_U)
    slots = tl.arange(0, BLOCK_K)
    if GATE:
        found = tl.load(chosen + row * K + slots, mask=slots < K, other=-1) >= 0
        temperature = tl.exp(tl.load(log_temperature).to(tl.float32))
        score = tl.load(scores + row * K + slots, mask=found, other=float("-inf")) * temperature  # [BLOCK_K]
        null = tl.load(null_score + row) * temperature
        top = tl.maximum(tl.max(score, axis=0), null)
        share = tl.exp(score - top)
        share = share / (tl.sum(share, axis=0) + tl.exp(null - top))
    total = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    most = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([BLOCK_H], dtype=tl.float32)
    for slot in tl.range(0, K, loop_unroll_factor=UNROLL):
        chunk = tl.load(chosen + row * K + slot)
        valid = u < tl.where(chunk >= 0, U, 0)
        token = _token_ids(ids, offset, row, chunk, u, valid, C, U)  # [BLOCK_U]
        e = tl.load(embedding + token[:, None] * D + columns[None, :], mask=valid[:, None] & here[None, :], other=0.0)
        logit = tl.zeros([BLOCK_H, BLOCK_U], dtype=tl.float32)
        square = tl.zeros([BLOCK_U], dtype=tl.float32)
        for part in tl.static_range(PARTS):
            at = row * PARTS + part
            square += tl.load(squares + at * (K * U) + slot * U + u, mask=valid, other=0.0)
            logit += tl.load(logits + (at * H + heads)[:, None] * (K * U) + (slot * U + u)[None, :],
                             mask=(heads < H)[:, None] & valid[None, :], other=0.0)
        unit = tl.full([BLOCK_U], 1.0, dtype=tl.float32)
        if NORM:
            unit = tl.rsqrt(square / D + eps)
        logit = tl.where(valid[None, :], logit * unit[None, :], float("-inf"))
        if GATE:
            top_logit = tl.where(chunk >= 0, tl.max(logit, axis=1), 0.0)  # [BLOCK_H]
            probs = tl.exp(logit - top_logit[:, None])
            own = tl.sum(tl.where(slots == slot, share, 0.0), axis=0) / tl.maximum(tl.sum(probs, axis=1), 1e-30)
            probs = probs * own[:, None]
        else:
            highest = tl.maximum(most, tl.max(logit, axis=1))
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            probs = tl.exp(logit - safe[:, None])
            fade = tl.exp(most - safe)  # 0 before the first chunk
            weight = weight * fade + tl.sum(probs, axis=1)
            total = total * fade[:, None]
            most = highest
        total += _dot(probs * unit[None, :], e, PRECISION)
    if not GATE:
        total = total / tl.maximum(weight, 1e-30)[:, None]
    if NORM:
        total *= tl.load(norm + columns, mask=here, other=0.0).to(tl.float32)[None, :]
    tl.store(mean + (row * H + heads)[:, None] * D + columns[None, :], total,
             mask=(heads < H)[:, None] & here[None, :])


@triton.jit
def _rows_dot(x, w, rows, heads, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products of the matrix rows `rows` [BLOCK_R] with the vectors at x that `heads` [BLOCK_R] names: [BLOCK_R]."""
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        here = (rows < D)[:, None] & (columns < D)[None, :]
        a = tl.load(w + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=here, other=0.0)
        b = tl.load(x + heads[:, None] * D + columns[None, :], mask=here, other=0.0)
        total += tl.sum(a.to(tl.float32) * b, axis=1)
    return total


@triton.jit
def _value_kernel(
    mean, w_v, o, D: tl.constexpr, H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.program_id(1).to(tl.int64)
    total = _rows_dot(mean + row * H * D, w_v, rows, rows // (D // H), D, BLOCK_R, BLOCK_D)
    tl.store(o + row * D + rows, total, mask=rows < D)


@triton.jit
def _mix_kernel(
    o, w_o, mixed, chosen, alpha_logit, alpha_bias, y, alpha, stride_alpha,
    D: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, LEARNED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.program_id(1).to(tl.int64)
    total = _rows_dot(o + row * D, w_o, rows, rows * 0, D, BLOCK_R, BLOCK_D)
    own = tl.load(mixed + row * D + rows, mask=rows < D, other=0.0).to(tl.float32)
    if LEARNED:
        logit = tl.load(alpha_logit + row * stride_alpha).to(tl.float32) + tl.load(alpha_bias).to(tl.float32)
        alpha = tl.sigmoid(logit)
    total = tl.where(tl.load(chosen + row * K) >= 0, alpha * own + (1 - alpha) * total, own)
    tl.store(y + row * D + rows, total.to(y.dtype.element_ty), mask=rows < D)


@triton.jit
def _encode_kernel(
    ids, length, offset, embedding, norm, place, w_chunk, table, eps, C, N,
    D: tl.constexpr, E: tl.constexpr, U: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, NORM: tl.constexpr, PLACE: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(length) - tl.load(offset + row)
    if (position >= 0) & ((position + 1) % U == 0):  # padding has negative positions
        chunk = position // U
        columns = tl.arange(0, BLOCK_D)
        here = columns < D
        pooled = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, U, BLOCK_T):
            u = start + tl.arange(0, BLOCK_T)
            valid = u < U
            token = _token_ids(ids, offset, row, chunk, u, valid, C, U)
            both = valid[:, None] & here[None, :]
            e = tl.load(embedding + token[:, None] * D + columns[None, :], mask=both, other=0.0).to(tl.float32)
            if NORM:
                e *= tl.rsqrt(tl.sum(e * e, axis=1) / D + eps)[:, None]
            if PLACE:
                e *= tl.load(place + u[:, None] * D + columns[None, :], mask=both, other=0.0).to(tl.float32)
            pooled += tl.sum(e, axis=0)
        if NORM:
            pooled *= tl.load(norm + columns, mask=here, other=0.0).to(tl.float32)
        to = table + (row * N + chunk) * E
        if LINEAR:
            total = tl.zeros([BLOCK_E], dtype=tl.float32)
            for start in range(0, E, BLOCK_E):
                result = _chunk_rows(pooled, w_chunk, start + tl.arange(0, BLOCK_E), columns, E, D)
                total += result * result
            unit = 1 / tl.maximum(tl.sqrt(tl.sum(total, axis=0)), 1e-12)
            for start in range(0, E, BLOCK_E):  # again: the first time no element knew the length of all
                at = start + tl.arange(0, BLOCK_E)
                result = _chunk_rows(pooled, w_chunk, at, columns, E, D) * unit
                tl.store(to + at, result.to(table.dtype.element_ty), mask=at < E)
        else:
            unit = 1 / tl.maximum(tl.sqrt(tl.sum(pooled * pooled, axis=0)), 1e-12)
            tl.store(to + columns, (pooled * unit).to(table.dtype.element_ty), mask=here)


@triton.jit
def _chunk_rows(pooled, w_chunk, at, columns, E: tl.constexpr, D: tl.constexpr):
    """The numbers `at` of a chunk's embedding, not yet of unit length."""
    mask = (at < E)[:, None] & (columns < D)[None, :]
    a = tl.load(w_chunk + at[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(a * pooled[None, :], axis=1)


def retrieve(
    x: Tensor, table: Tensor, ids: Tensor, length: Tensor, offset: Tensor, embedding: Tensor, weights: Weights,
    *, top_k: int, num_heads: int, chunk_size: int,
) -> Retrieved:  # fmt: skip
    """Search the chunks and attend to the best of them: five launches that need nothing of the mixer.

    Args:
        x: [B, D] the layer's input, bf16, fp16 or fp32, at most `matvec.MOST_ROWS` rows.
        table: [B, N, E] unit embeddings of the chunks so far. Of those of a row at position p the first p // U are
            read, so that it does not matter whether `encode_newest`, which writes number p // U, ran before.
        ids: [B, C] int64 token ids, the new one among them; row b begins in column offset[b].
        length: [] int64, the column of the new token; offset: [B] int64.
        embedding: [V, D] initial embeddings.
        weights: the parameters of the layer.
        top_k: k. num_heads: H. chunk_size: U.

    All tensors must be contiguous.

    Raises:
        ValueError: more rows, chunks, heads, channels or tokens a chunk than the kernels take (`fits`).
    """
    w, (B, D), (_, N, E) = weights, x.shape, table.shape
    if reason := fits(rows=B, hidden_size=D, encoder_dim=E, top_k=top_k, num_heads=num_heads, chunk_size=chunk_size):
        raise ValueError(f"resona_step takes {reason}")
    H, U, K, C = num_heads, chunk_size, top_k, ids.shape[1]
    head = D // H
    learned, blank = not isinstance(w.alpha, float), x  # blank: never read
    precision = "ieee" if triton.knobs.runtime.interpret else _PRECISION[x.dtype]  # the interpreter knows no other

    products = matvec(x, [w.q, *([] if w.query is None else [w.query]), *([w.alpha[0]] if learned else [])])
    q, query = products[0], x if w.query is None else products[1]
    numbers = {"dtype": torch.float32, "device": x.device}
    block_d = min(_KEY_COLUMNS, max(_LEAST_COLUMNS, triton.next_power_of_2(D * H // _KEY_PROGRAMS)))
    block_n = max(MOST_CHUNKS, min(64, _SEARCHED // triton.next_power_of_2(E)))
    key_programs, search_programs = H * triton.cdiv(D, block_d), triton.cdiv(N, block_n)
    t = torch.empty(B, H, D, **numbers)
    best, null_score = torch.empty(B, search_programs * K, **numbers), torch.empty(B, **numbers)
    best_at = torch.empty(B, search_programs * K, dtype=torch.int32, device=x.device)
    _score_kernel[(key_programs + search_programs, B)](
        q, w.k, _or(w.norm, blank), t, query, table, _or(w.null, blank), best, best_at, null_score, length, offset,
        head**-0.5, q.stride(0), query.stride(0), N,
        D=D, HEAD=head, BLOCK_R=_rows_of(_KEYS, block_d, head), BLOCK_D=block_d, E=E, U=U, K=K, BLOCK_N=block_n,
        BLOCK_E=min(512, triton.next_power_of_2(E)), NORM=w.norm is not None, NULL=w.null is not None,
        KEY_PROGRAMS=key_programs, num_warps=4,
    )  # fmt: skip

    chosen = torch.empty(B, K, dtype=torch.int32, device=x.device)
    scores = torch.empty(B, K, **numbers)
    block_d = max(16, min(_LOGIT_BYTES // x.element_size(), triton.next_power_of_2(D)))
    parts, token_blocks = triton.cdiv(D, block_d), triton.cdiv(U, _LOGIT_TOKENS)
    block_h = max(16, triton.next_power_of_2(H))
    logits, squares = torch.empty(B, parts, H, K * U, **numbers), torch.empty(B, parts, K * U, **numbers)
    _logit_kernel[(parts * token_blocks * K, B)](
        t, best, best_at, ids, offset, embedding, chosen, scores, logits, squares, C, N,
        D=D, H=H, U=U, K=K, CANDIDATES=search_programs * K,
        BLOCK_C=triton.next_power_of_2(search_programs * K), BLOCK_H=block_h, BLOCK_T=_LOGIT_TOKENS, BLOCK_D=block_d,
        TOKEN_BLOCKS=token_blocks, PARTS=parts, PRECISION=precision, num_warps=4,
    )  # fmt: skip

    mean, o = torch.empty(B, H, D, **numbers), torch.empty(B, D, **numbers)
    block_d = max(16, min(_TOKEN_CHANNELS, triton.next_power_of_2(D)))
    _token_kernel[(triton.cdiv(D, block_d), B)](
        chosen, scores, null_score, _or(w.log_temperature, blank), logits, squares, ids, offset, embedding,
        _or(w.norm, blank), mean, w.eps, C, D=D, H=H, U=U, K=K, BLOCK_K=triton.next_power_of_2(K), BLOCK_H=block_h,
        BLOCK_U=max(16, triton.next_power_of_2(U)), BLOCK_D=block_d, PARTS=parts, NORM=w.norm is not None,
        GATE=w.null is not None, PRECISION=precision, UNROLL=min(K, 4),
        num_stages=1, num_warps=4 if block_h * U <= _LOGITS else 8,
    )  # fmt: skip

    programs, tile = _matrix_rows(B, D)
    _value_kernel[programs](mean, w.v, o, D=D, H=H, **tile)
    return Retrieved(o, chosen, products[-1] if learned else None)


def mix(found: Retrieved, mixed: Tensor, weights: Weights) -> Tensor:
    """What was retrieved, projected, and mixed [B, D], which the mixer gave, by alpha: [B, D] in mixed's dtype.

    `mixed` itself in rows in which no chunk was found. Contiguous, as all tensors here.
    """
    w, (B, D) = weights, mixed.shape
    learned = found.alpha_logit is not None
    alpha_logit, bias = (found.alpha_logit, w.alpha[1]) if learned else (mixed, mixed)  # not learned: never read
    y = torch.empty_like(mixed)
    programs, tile = _matrix_rows(B, D)
    _mix_kernel[programs](
        found.o, w.o, mixed, found.chosen, alpha_logit, bias, y, 0.0 if learned else w.alpha, alpha_logit.stride(0),
        D=D, K=found.chosen.shape[1], LEARNED=learned, **tile,
    )  # fmt: skip
    return y


def encode_newest(
    table: Tensor, ids: Tensor, length: Tensor, offset: Tensor, embedding: Tensor, weights: Weights,
    *, chunk_size: int,
) -> None:  # fmt: skip
    """Write the embedding of the chunk that the new token completes, if it does, into the table [B, N, E].

    Arguments as for `retrieve`. Tokens after this one are the first to see that chunk.
    """
    w, (B, N, E), D, U = weights, table.shape, embedding.shape[1], chunk_size
    blank = embedding  # never read
    _encode_kernel[(B,)](
        ids, length, offset, embedding, _or(w.norm, blank), _or(w.place, blank), _or(w.chunk, blank), table,
        w.eps, ids.shape[1], N, D=D, E=E, U=U, BLOCK_D=triton.next_power_of_2(D), BLOCK_E=_rows_of(_ENCODED, D, E),
        BLOCK_T=_rows_of(_ENCODED, D, U), NORM=w.norm is not None, PLACE=w.place is not None,
        LINEAR=w.chunk is not None, num_warps=8,
    )  # fmt: skip


def fits(*, rows: int, hidden_size: int, encoder_dim: int, top_k: int, num_heads: int, chunk_size: int) -> str:
    """What the kernels take and this is more than; empty where they take it."""
    logits = triton.next_power_of_2(num_heads) * triton.next_power_of_2(chunk_size)
    for value, most, what in (
        (rows, MOST_ROWS, "rows"), (hidden_size, MOST_CHANNELS, "channels"), (num_heads, MOST_HEADS, "heads"),
        (encoder_dim, MOST_CHANNELS, "numbers a chunk embedding"), (top_k, MOST_CHUNKS, "chunks a query"),
        (chunk_size, MOST_TOKENS, "tokens a chunk"), (logits, MOST_LOGITS, "heads times tokens a chunk"),
    ):  # fmt: skip
        if value > most:
            return f"at most {most} {what}, got {value}"
    return ""


def _matrix_rows(B: int, D: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs and tile of the kernels that multiply B vectors with a [D, D] matrix."""
    block_d = min(_COLUMNS, triton.next_power_of_2(D))
    return (triton.cdiv(D, _ROWS), B), {"BLOCK_R": _ROWS, "BLOCK_D": block_d, "num_warps": warps(_ROWS * block_d)}


def _rows_of(elements: int, width: int, most: int) -> int:
    """Rows of a tile of so many elements, a power of two; no more than it takes to hold `most`."""
    return min(max(1, elements // triton.next_power_of_2(width)), triton.next_power_of_2(most))


def _or(tensor: Tensor | None, blank: Tensor) -> Tensor:
    return blank if tensor is None else tensor
