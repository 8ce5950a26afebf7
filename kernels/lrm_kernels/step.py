"""One decoded token of every recurrence with a matrix-valued state, the state changed in place.

    S = exp(log_decay) S                       decay by head or by key channel, or none
    S = S + beta k (v - S^T k)^T               with beta: the delta rule;  without: S + k v^T
    o = scale * S^T q                          q and k brought to unit length before, if asked for

The libraries' kernels write the new state elsewhere and split the key channels over programs whose results a second
kernel adds up; for one token the launches cost more than the work. Here a program holds all key channels of a few
value channels, so each element of the state is read once and written once.

B batch, H heads, K key and V value channels per head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NORM_EPS = 1e-6
_MOST_KEYS = 1024  # of a head, held by one program; the merged head of a 1.3B GLA has 1,024
_ELEMENTS = 4096  # of the state in one program, or two value channels where the keys are many


def step_reference(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, log_decay: Tensor | None = None, beta: Tensor | None = None,
    scale: float = 1.0, l2_norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `step` computes, in plain torch: o [B, H, V] in v's dtype, and the new state."""
    q, k, value = q.float(), k.float(), v.float()
    if l2_norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS) for x in (q, k))
    q = q * scale
    if log_decay is not None:
        decay = log_decay.float().exp()
        state = state * (decay.unsqueeze(-1) if decay.dim() == 3 else decay[..., None, None])
    if beta is not None:
        value = beta.float().unsqueeze(-1) * (value - torch.einsum("bhkv,bhk->bhv", state, k))
    state = state + k.unsqueeze(-1) * value.unsqueeze(-2)  # [B, H, K, V]
    return torch.einsum("bhkv,bhk->bhv", state, q).to(v.dtype), state


@triton.jit
def _step_kernel(
    q, k, v, state, log_decay, beta, o, scale,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_db, stride_dh, stride_bb, stride_bh,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAY_BY_KEY: tl.constexpr, DECAY_BY_HEAD: tl.constexpr, DELTA: tl.constexpr, L2_NORM: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    values = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    keys = tl.arange(0, BLOCK_K)
    here_k, here_v = keys < K, values < V
    here = here_k[:, None] & here_v[None, :]
    place = state + head * K * V + keys[:, None] * V + values[None, :]
    S = tl.load(place, mask=here, other=0.0)  # [BLOCK_K, BLOCK_V]
    query = tl.load(q + b * stride_qb + h * stride_qh + keys, mask=here_k, other=0.0).to(tl.float32)
    key = tl.load(k + b * stride_kb + h * stride_kh + keys, mask=here_k, other=0.0).to(tl.float32)
    if L2_NORM:
        query *= tl.rsqrt(tl.sum(query * query, axis=0) + EPS)
        key *= tl.rsqrt(tl.sum(key * key, axis=0) + EPS)
    query *= scale
    value = tl.load(v + b * stride_vb + h * stride_vh + values, mask=here_v, other=0.0).to(tl.float32)
    if DECAY_BY_KEY:
        decay = tl.load(log_decay + b * stride_db + h * stride_dh + keys, mask=here_k, other=0.0).to(tl.float32)
        S *= tl.exp(decay)[:, None]
    if DECAY_BY_HEAD:
        S *= tl.exp(tl.load(log_decay + b * stride_db + h * stride_dh).to(tl.float32))
    if DELTA:
        rate = tl.load(beta + b * stride_bb + h * stride_bh).to(tl.float32)
        value = rate * (value - tl.sum(S * key[:, None], axis=0))
    S += key[:, None] * value[None, :]
    tl.store(place, S, mask=here)
    result = tl.sum(S * query[:, None], axis=0)  # [BLOCK_V]
    tl.store(o + head * V + values, result.to(o.dtype.element_ty), mask=here_v)


def fits(K: int) -> bool:
    """Whether a head of K key channels can be held by one program."""
    return K <= _MOST_KEYS


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, log_decay: Tensor | None = None, beta: Tensor | None = None,
    scale: float = 1.0, l2_norm: bool = False,
) -> Tensor:  # fmt: skip
    """One token; the state is changed in place.

    Args:
        q, k: [B, H, K]; v: [B, H, V]; their last dimension contiguous.
        state: [B, H, K, V] fp32, contiguous.
        log_decay: [B, H, K] or [B, H]; none by default.
        beta: [B, H] for the delta rule, whose keys should be of unit length.
        scale: of the queries.
        l2_norm: bring queries and keys to unit length first.

    Returns:
        o [B, H, V] in v's dtype.

    Raises:
        ValueError: a head has too many key channels (`fits`), or the state is not contiguous fp32.
    """
    B, H, K, V = state.shape
    if not fits(K):
        raise ValueError(f"a head may have at most {_MOST_KEYS} key channels, got {K}")
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise ValueError("the state must be contiguous float32: it is changed in place")
    o = v.new_empty(B, H, V)
    block_k = triton.next_power_of_2(K)
    block_v = max(2, min(triton.next_power_of_2(V), _ELEMENTS // block_k))
    decay, rate = (state if x is None else x for x in (log_decay, beta))  # never read where None
    _step_kernel[(triton.cdiv(V, block_v), B * H)](
        q, k, v, state, decay, rate, o, scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *decay.stride()[:2], *rate.stride()[:2],
        H=H, K=K, V=V, BLOCK_K=block_k, BLOCK_V=block_v,
        DECAY_BY_KEY=log_decay is not None and log_decay.dim() == 3,
        DECAY_BY_HEAD=log_decay is not None and log_decay.dim() == 2, DELTA=beta is not None,
        L2_NORM=l2_norm, EPS=_NORM_EPS, num_warps=4,
    )  # fmt: skip
    return o
