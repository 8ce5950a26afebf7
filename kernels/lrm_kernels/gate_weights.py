"""The gate of Resona's chunks: a softmax over the scores of those found and of the null chunk.

    null[t] = q[t] . null_chunk / max(|null_chunk|, EPS)
    w[t, j] = exp(tau s[t, j]) / (exp(tau null[t]) + sum over found i of exp(tau s[t, i]))     tau = e^log_temperature

Symbols
    M  positions    k  chunks of a position    E  size of an embedding    P  programs of the backward pass
One launch forward. Backward, each program adds up the gradients of null_chunk and log_temperature over its positions,
and a last one over the programs, in order: the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_kernels.column_sums import MOST_PARTS
from lrm_kernels.unit_rows import d_unit, unit_scale

MOST_CHANNELS = 8192  # of an embedding, which a program holds whole

_ELEMENTS = 4096  # of the queries in one program, where an embedding has fewer
_ROWS = 8192  # elements of the parts in one step of the last program


@triton.jit
def _unit_null(null_chunk, channels, E: tl.constexpr):
    """The null chunk at unit length: [1, BLOCK_E] fp32."""
    null = tl.load(null_chunk + channels, mask=channels < E, other=0.0).to(tl.float32)[None, :]
    scale, _ = unit_scale(null)
    return null * scale


@triton.jit
def _softmax(queries, unit, scores, indices, row, inside, tau, channels, E: tl.constexpr, K: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """Queries, logits and weights of the chunks and of the null chunk for rows of positions, and which are found."""
    q = tl.load(queries + row[:, None] * E + channels[None, :],
                mask=inside[:, None] & (channels < E)[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_E]
    null = tl.sum(q * unit, axis=1) * tau  # [BLOCK_M]
    slots = tl.arange(0, BLOCK_K)
    at = row[:, None] * K + slots[None, :]
    there = inside[:, None] & (slots < K)[None, :]
    found = tl.load(indices + at, mask=there, other=-1) != -1  # [BLOCK_M, BLOCK_K]
    logits = tl.load(scores + at, mask=found, other=0.0).to(tl.float32) * tau
    top = tl.maximum(tl.max(tl.where(found, logits, float("-inf")), axis=1), null)
    weights = tl.where(found, tl.exp(logits - top[:, None]), 0.0)
    null_weight = tl.exp(null - top)
    share = 1.0 / (tl.sum(weights, axis=1) + null_weight)
    return q, logits, weights * share[:, None], null, null_weight * share, at, there


@triton.jit(do_not_specialize=["rows"])
def _gate_kernel(
    queries, scores, indices, null_chunk, log_temperature, weights, rows,
    E: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_E)
    unit = _unit_null(null_chunk, channels, E)
    tau = tl.exp(tl.load(log_temperature).to(tl.float32))
    _, _, w, _, _, at, there = _softmax(
        queries, unit, scores, indices, row, row < rows, tau, channels, E, K, BLOCK_K
    )  # fmt: skip
    tl.store(weights + at, w.to(weights.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _d_gate_kernel(
    queries, scores, indices, null_chunk, log_temperature, d_weights, d_queries, d_scores, part_null, part_tau, rows,
    E: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK_E)
    unit = _unit_null(null_chunk, channels, E)
    tau = tl.exp(tl.load(log_temperature).to(tl.float32))
    d_null = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    d_tau = tl.zeros([BLOCK_M], dtype=tl.float32)  # of its logarithm
    for start in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = row < rows
        q, logits, w, null, null_weight, at, there = _softmax(
            queries, unit, scores, indices, row, inside, tau, channels, E, K, BLOCK_K
        )  # fmt: skip
        d_w = tl.where(w > 0.0, tl.load(d_weights + at, mask=there, other=0.0).to(tl.float32), 0.0)
        mean = tl.sum(w * d_w, axis=1)
        d_logits = w * (d_w - mean[:, None])  # zero where there is no chunk
        d_null_logit = tl.where(inside, -null_weight * mean, 0.0)
        d_tau += tl.sum(d_logits * logits, axis=1) + d_null_logit * null
        d_null_score = (d_null_logit * tau)[:, None]
        d_null += d_null_score * q
        tl.store(d_scores + at, (d_logits * tau).to(d_scores.dtype.element_ty), mask=there)
        tl.store(d_queries + row[:, None] * E + channels[None, :],
                 (d_null_score * unit).to(d_queries.dtype.element_ty), mask=inside[:, None] & (channels < E)[None, :])
    program = tl.program_id(0)
    tl.store(part_null + program.to(tl.int64) * E + channels, tl.sum(d_null, axis=0), mask=channels < E)
    tl.store(part_tau + program, tl.sum(d_tau, axis=0))


@triton.jit(do_not_specialize=["parts"])
def _d_parameters_kernel(
    part_null, part_tau, null_chunk, d_null_chunk, d_log_temperature, parts,
    E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_P, BLOCK_E], dtype=tl.float32)
    total_tau = tl.zeros([BLOCK_P], dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        total += tl.load(part_null + part[:, None] * E + channels[None, :],
                         mask=(part < parts)[:, None] & (channels < E)[None, :], other=0.0)
        total_tau += tl.load(part_tau + part, mask=part < parts, other=0.0)
    null = tl.load(null_chunk + channels, mask=channels < E, other=0.0).to(tl.float32)[None, :]
    gradient = tl.sum(d_unit(null, tl.sum(total, axis=0)[None, :]), axis=0)  # [1, BLOCK_E] -> [BLOCK_E]
    tl.store(d_null_chunk + channels, gradient.to(d_null_chunk.dtype.element_ty), mask=channels < E)
    tl.store(d_log_temperature, tl.sum(total_tau, axis=0).to(d_log_temperature.dtype.element_ty))


def _blocks(queries: Tensor, indices: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, programs that take each once, and what a kernel is compiled for."""
    E, K = queries.shape[-1], indices.shape[-1]
    block_e = triton.next_power_of_2(E)
    block_m = max(1, _ELEMENTS // block_e)
    rows = queries.numel() // E
    sizes = dict(E=E, K=K, BLOCK_M=block_m, BLOCK_E=block_e, BLOCK_K=triton.next_power_of_2(K), num_warps=4)
    return rows, triton.cdiv(rows, block_m), sizes


class _GateWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, scores, indices, null_chunk, log_temperature):
        ctx.save_for_backward(queries, scores, indices, null_chunk, log_temperature)
        weights = torch.empty_like(scores, dtype=queries.dtype)
        rows, programs, sizes = _blocks(queries, indices)
        _gate_kernel[(programs,)](queries, scores, indices, null_chunk, log_temperature, weights, rows, **sizes)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights):
        queries, scores, indices, null_chunk, log_temperature = ctx.saved_tensors
        rows, programs, sizes = _blocks(queries, indices)
        parts, E = min(programs, MOST_PARTS), sizes["E"]
        d_queries, d_scores, d_null, d_tau = map(torch.empty_like, (queries, scores, null_chunk, log_temperature))
        part_null, part_tau = (queries.new_empty(shape, dtype=torch.float32) for shape in ((parts, E), (parts,)))
        _d_gate_kernel[(parts,)](
            queries, scores, indices, null_chunk, log_temperature, d_weights.contiguous(), d_queries, d_scores,
            part_null, part_tau, rows, **sizes,
        )  # fmt: skip
        _d_parameters_kernel[(1,)](
            part_null, part_tau, null_chunk, d_null, d_tau, parts, E=E, BLOCK_P=max(1, _ROWS // sizes["BLOCK_E"]),
            BLOCK_E=sizes["BLOCK_E"], num_warps=8,
        )  # fmt: skip
        return d_queries, d_scores, None, d_null, d_tau


def gate_weights(
    queries: Tensor, scores: Tensor, indices: Tensor, null_chunk: Tensor, log_temperature: Tensor
) -> Tensor:
    """Softmax of the scores, sharpened by a temperature, over the chunks found and the null chunk; differentiable.

    Args:
        queries: [B, T, E] float32, float16 or bfloat16, not empty, E at most MOST_CHANNELS.
        scores: [B, T, k], in any of these dtypes; not read where there is no chunk.
        indices: [B, T, k] int64, -1 where there is none.
        null_chunk: [E], log_temperature: no dimension; in any of these dtypes.

    Returns:
        [B, T, k] in the queries' dtype, computed in fp32: exactly zero where there is no chunk; what is missing to one
        is the null chunk's.

    Raises:
        ValueError: shapes that do not fit, or embeddings that are too long.
    """
    *positions, E = queries.shape
    if list(scores.shape[:-1]) != positions or scores.shape != indices.shape or tuple(null_chunk.shape) != (E,):
        raise ValueError(f"queries [B, T, E], scores and indices [B, T, k] and null_chunk [E] must agree, got "
                         f"{tuple(queries.shape)}, {tuple(scores.shape)}, {tuple(indices.shape)}, "
                         f"{tuple(null_chunk.shape)}")
    if E > MOST_CHANNELS or queries.numel() == 0 or log_temperature.numel() != 1:
        raise ValueError(f"an embedding may have 1 to {MOST_CHANNELS} channels and the temperature is one number, got "
                         f"queries {tuple(queries.shape)} and log_temperature {tuple(log_temperature.shape)}")
    return _GateWeights.apply(
        queries.contiguous(), scores.contiguous(), indices.contiguous(), null_chunk.contiguous(), log_temperature
    )
