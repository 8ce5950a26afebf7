"""One token of softmax attention to keys and values that lie in buffers of fixed capacity.

How far the buffers are filled is read on the device, so that the launches are the same for every token and can be
captured in a CUDA graph. All that one token costs is reading the filled part, once; it is split over programs enough to
do that at the memory's speed (as in flash-decoding), each of which strides over tiles of slots: with few slots filled
of a large capacity the work is still spread. Two launches:

    new token's query and key rotated, and put into its slot; each program's softmax over its tiles    `_part_kernel`
    their sum                                                                                          `_merge_kernel`

The new token is not read back: it is what the first program of each group begins with.

Symbols
    B  rows, each with one new token    H  query heads    G  heads of keys and values    K  channels per head
    C  slots of the buffers    T  slots of a tile    S  programs that share a group's slots (splits)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MOST_CHANNELS = 256  # K
MOST_QUERIES = 32  # H / G

_PROGRAMS = 4 * 132  # about four on each multiprocessor of an H100
_ELEMENTS = 4096  # of a tile of keys that meets one query,
_BYTES = 16384  # and bytes of one that meets several in a matrix product, for which it goes through shared memory
_MOST_SLOTS, _LEAST_SLOTS = 128, 16  # T
_MERGED, _MERGED_CHANNELS = 64, 64  # splits held at a time, and channels of a program that merges them
_LOWEST = tl.constexpr(-1e30)  # score of no slot: finite, so that no difference of two is NaN


def attention_step_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, offset: Tensor,
    frequencies: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `attention_step` computes, in plain torch, in fp32 with every score written out."""
    if frequencies is not None:
        angle = (length - offset).float()[:, None, None] * frequencies  # [B, 1, K/2]
        halves = ((x.dtype, *x.float().chunk(2, dim=-1)) for x in (q, k))
        q, k = (torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).to(dtype)
                for dtype, a, b in halves)  # fmt: skip
    keys[:, :, length], values[:, :, length] = k, v
    slots = torch.arange(keys.shape[2], device=keys.device)
    visible = ((slots >= offset[:, None]) & (slots < length)) | (slots == length)  # [B, C]
    grouped = q.float().unflatten(1, (keys.shape[1], -1))  # [B, G, H/G, K]
    scores = torch.einsum("bgqk,bgck->bgqc", grouped, keys.float()) * q.shape[-1] ** -0.5
    probs = F.softmax(scores.masked_fill(~visible[:, None, None], -torch.inf), dim=-1)
    seen = values.float().masked_fill(~visible[:, None, :, None], 0)  # zero times what fills a slot must be zero
    return torch.einsum("bgqc,bgck->bgqk", probs, seen).flatten(1, 2).to(q.dtype)


@triton.jit
def _rotated(x, channel, mask, cos, sin, K: tl.constexpr, ROTARY: tl.constexpr):
    """Vectors at x, channel i turned against channel i + K/2; `sin` is negative for the first half."""
    y = tl.load(x + channel, mask=mask, other=0.0)
    if ROTARY:
        other = tl.where(channel < K // 2, channel + K // 2, channel - K // 2)
        z = tl.load(x + other, mask=mask, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) * cos + z * sin).to(x.dtype.element_ty)
    return y


@triton.jit
def _tile(keys, values, tile, first, filled, channel, here, K: tl.constexpr, BLOCK_T: tl.constexpr):
    """Keys and values [BLOCK_T, BLOCK_K] of a tile, and which of its slots are filled [BLOCK_T]."""
    slot = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    seen = (slot >= first) & (slot < filled)
    mask = seen[:, None] & here[None, :]
    at = slot.to(tl.int64)[:, None] * K + channel[None, :]  # [BLOCK_T, BLOCK_K]
    return tl.load(keys + at, mask=mask, other=0.0), tl.load(values + at, mask=mask, other=0.0), seen


@triton.jit
def _one_query(
    query, new_key, new_value, keys, values, first, filled, split, splits, scale, channel, here,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Highest score, sum of weights and weighted values [BLOCK_K] of this program's slots, for a query [BLOCK_K].

    Each place of a tile keeps a softmax of its own over all tiles, so that nothing is summed over places until the end.
    """
    query = query.to(tl.float32) * scale
    place = tl.arange(0, BLOCK_T)
    own = (place == 0) & (split == 0)
    top = tl.where(own, tl.sum(query * new_key.to(tl.float32), axis=0), _LOWEST)  # [BLOCK_T]
    weight = tl.where(own, 1.0, 0.0)
    total = tl.where(own[:, None], new_value.to(tl.float32)[None, :], 0.0)  # [BLOCK_T, BLOCK_K]
    for tile in range(first // BLOCK_T + split, tl.cdiv(filled, BLOCK_T), splits):
        key, value, seen = _tile(keys, values, tile, first, filled, channel, here, K, BLOCK_T)
        score = tl.where(seen, tl.sum(key.to(tl.float32) * query[None, :], axis=1), float("-inf"))  # [BLOCK_T]
        highest = tl.maximum(top, score)
        fade, prob = tl.exp2(top - highest), tl.exp2(score - highest)
        weight = weight * fade + prob
        total = total * fade[:, None] + prob[:, None] * value.to(tl.float32)
        top = highest
    highest = tl.max(top, axis=0)
    share = tl.exp2(top - highest)
    return highest, tl.sum(weight * share, axis=0), tl.sum(total * share[:, None], axis=0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "native":
        result = tl.dot(a, b)
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return result


@triton.jit
def _queries(
    query, new_key, new_value, keys, values, first, filled, split, splits, scale, channel, here,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_one_query`, for the queries [BLOCK_Q, BLOCK_K] of a group: [BLOCK_Q] twice and [BLOCK_Q, BLOCK_K]."""
    own = split == 0
    score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale  # [BLOCK_Q]
    top = tl.where(own, score, _LOWEST)
    weight = tl.where(own, tl.full(score.shape, 1.0, tl.float32), 0.0)
    total = tl.where(own, tl.broadcast_to(new_value.to(tl.float32)[None, :], query.shape), 0.0)  # [BLOCK_Q, BLOCK_K]
    for tile in range(first // BLOCK_T + split, tl.cdiv(filled, BLOCK_T), splits):
        key, value, seen = _tile(keys, values, tile, first, filled, channel, here, K, BLOCK_T)
        scores = _dot(query, tl.trans(key), PRECISION) * scale  # [BLOCK_Q, BLOCK_T]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=1))
        fade, prob = tl.exp2(top - highest), tl.exp2(scores - highest[:, None])
        weight = weight * fade + tl.sum(prob, axis=1)
        total = total * fade[:, None] + _dot(prob.to(value.dtype), value, PRECISION)
        top = highest
    return top, weight, total


@triton.jit
def _part_kernel(
    q, k, v, keys, values, frequencies, length, offset, tops, weights, totals, scale,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, C,
    G: tl.constexpr, QUERIES: tl.constexpr, K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, ROTARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(0), tl.num_programs(0)
    group = tl.program_id(1).to(tl.int64)
    b, g = group // G, group % G
    filled, padding = tl.load(length).to(tl.int32), tl.load(offset + b).to(tl.int32)
    channel = tl.arange(0, BLOCK_K)
    here = channel < K
    keys += group * C * K
    values += group * C * K

    cos = tl.full([BLOCK_K], 1.0, tl.float32)
    sin = tl.zeros([BLOCK_K], dtype=tl.float32)
    if ROTARY:
        half = tl.where(channel < K // 2, channel, channel - K // 2)
        angle = (filled - padding).to(tl.float32) * tl.load(frequencies + half, mask=here, other=0.0)
        cos = tl.cos(angle)
        sin = tl.where(channel < K // 2, -tl.sin(angle), tl.sin(angle))
    new_key = _rotated(k + b * stride_kb + g * stride_kh, channel, here, cos, sin, K, ROTARY)  # [BLOCK_K]
    new_value = tl.load(v + b * stride_vb + g * stride_vh + channel, mask=here, other=0.0)
    if split == 0:
        to = filled.to(tl.int64) * K + channel
        tl.store(keys + to, new_key, mask=here)
        tl.store(values + to, new_value, mask=here)

    first = tl.maximum(padding, 0)
    q += b * stride_qb + g * QUERIES * stride_qh
    at = group * splits + split
    if QUERIES == 1:
        query = _rotated(q, channel, here, cos, sin, K, ROTARY)
        top, weight, total = _one_query(query, new_key, new_value, keys, values, first, filled, split, splits, scale,
                                        channel, here, K, BLOCK_K, BLOCK_T)
        tl.store(tops + at, top)
        tl.store(weights + at, weight)
        tl.store(totals + at * K + channel, total, mask=here)
    else:
        i = tl.arange(0, BLOCK_Q)
        there = (i < QUERIES)[:, None] & here[None, :]
        query = _rotated(q + i[:, None] * stride_qh, channel[None, :], there, cos[None, :], sin[None, :], K, ROTARY)
        top, weight, total = _queries(query, new_key, new_value, keys, values, first, filled, split, splits, scale,
                                      channel, here, K, BLOCK_K, BLOCK_T, PRECISION)
        tl.store(tops + at * QUERIES + i, top, mask=i < QUERIES)
        tl.store(weights + at * QUERIES + i, weight, mask=i < QUERIES)
        tl.store(totals + (at * QUERIES + i)[:, None] * K + channel[None, :], total, mask=there)


@triton.jit
def _merge_kernel(
    tops, weights, totals, o, S,
    QUERIES: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    head = tl.program_id(1).to(tl.int64)
    here = channel < K
    begin = (head // QUERIES) * S * QUERIES + head % QUERIES
    every = tl.arange(0, BLOCK_S)
    top = tl.load(tops + begin + every * QUERIES, mask=every < S, other=_LOWEST)
    highest = tl.max(top, axis=0)
    weight = tl.load(weights + begin + every * QUERIES, mask=every < S, other=0.0)
    weight = tl.sum(weight * tl.exp2(top - highest), axis=0)
    result = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, S, PART):
        split = start + tl.arange(0, PART)
        at = begin + split * QUERIES  # [PART]
        share = tl.exp2(tl.load(tops + at, mask=split < S, other=_LOWEST) - highest)
        part = tl.load(totals + at[:, None] * K + channel[None, :], mask=(split < S)[:, None] & here[None, :],
                       other=0.0)  # [PART, BLOCK_D]
        result += tl.sum(share[:, None] * part, axis=0)
    tl.store(o + head * K + channel, (result / weight).to(o.dtype.element_ty), mask=here)


def fits(*, head_dim: int, queries: int) -> str:
    """What `attention_step` takes at most, where heads of these sizes are more than that; "" where they are not.

    Args:
        head_dim: K. queries: H / G, heads that share keys and values.
    """
    for what, value, most in (("channels a head", head_dim, MOST_CHANNELS),
                              ("queries that share a key", queries, MOST_QUERIES)):  # fmt: skip
        if value > most:
            return f"at most {most} {what}, got {value}"
    return ""


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, offset: Tensor,
    frequencies: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of one token to itself and to what the buffers hold; it is added to them.

    Args:
        q: [B, H, K]. k, v: [B, G, K], G dividing H; their last dimension contiguous.
        keys, values: [B, G, C, K] contiguous, of q's dtype (bf16, fp16 or fp32). The new token goes into slot `length`;
            slots behind it are not read.
        length: [] int64, slots that are filled, below C.
        offset: [B] int64, how many of them are left padding in each row, which are not read.
        frequencies: [K/2] fp32, radians a position, to rotate the new query and key by its position length - offset;
            None for queries and keys that are to stay as they are.

    Returns:
        [B, H, K] in q's dtype.

    Raises:
        ValueError: heads that are too large (`fits`), or buffers that cannot be changed in place.
    """
    (B, H, K), (_, G, C, _) = q.shape, keys.shape
    queries = H // G
    if reason := fits(head_dim=K, queries=queries):
        raise ValueError(f"attention_step takes {reason}")
    if not keys.is_contiguous() or not values.is_contiguous() or {keys.dtype, values.dtype} != {q.dtype}:
        raise ValueError(f"the buffers must be contiguous {q.dtype}: they are changed in place")
    block_k, block_q = triton.next_power_of_2(K), 1
    block_t = _ELEMENTS // block_k
    if queries > 1:  # a matrix product, which has 16 rows and columns at least
        block_k, block_q = max(16, block_k), max(16, triton.next_power_of_2(queries))
        block_t = _BYTES // (block_k * q.element_size())
    block_t = max(_LEAST_SLOTS, min(_MOST_SLOTS, block_t))
    S = max(1, min(triton.cdiv(C, block_t), _PROGRAMS // (B * G)))  # of the shapes alone: a graph cannot change it
    tops, weights = torch.empty(2, B, G, S, queries, dtype=torch.float32, device=q.device)
    totals = torch.empty(B, G, S, queries, K, dtype=torch.float32, device=q.device)
    precision = "tf32x3" if q.dtype == torch.float32 else "native"
    _part_kernel[(S, B * G)](
        q, k, v, keys, values, keys if frequencies is None else frequencies, length, offset, tops, weights, totals,
        K**-0.5 * math.log2(math.e), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], C,
        G=G, QUERIES=queries, K=K, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_T=block_t, ROTARY=frequencies is not None,
        PRECISION="ieee" if triton.knobs.runtime.interpret else precision, num_warps=4,  # it knows no other
    )  # fmt: skip
    o = torch.empty(B, H, K, dtype=q.dtype, device=q.device)
    block_d = min(_MERGED_CHANNELS, triton.next_power_of_2(K))
    _merge_kernel[(triton.cdiv(K, block_d), B * H)](
        tops, weights, totals, o, S, QUERIES=queries, K=K, BLOCK_S=triton.next_power_of_2(S), PART=_MERGED,
        BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return o
