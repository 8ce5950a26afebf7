"""Retention: a linear recurrence whose state decays by one constant factor per head.

    S[t] = gamma S[t-1] + k[t] v[t]^T          o[t] = scale * S[t]^T q[t]

(RetNet, arXiv 2307.08621, equation 6, without the rotation of q and k.) `retention_recurrent` is that loop in fp32,
the oracle; `retention_chunked` is the form to train with (equation 7); `retention_step` decodes one token.

B batch, T tokens, H heads, K key channels per head, V value channels per head
C tokens in a chunk, N chunks, L[n] tokens in chunk n (C, but for the last)
S state [K, V]; log_decay = log(gamma) [H]

A constant decay over m tokens is exp(m * log_decay): every exponent is taken from a count of tokens and is at most 0,
so no decay is too strong, and the weights within a chunk are one [C, C] matrix per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrm_recall.ops.chunks import from_chunks, through_states, to_chunks, tokens_behind
from lrm_recall.ops.dispatch import dispatched


def multi_scale_log_decay(num_heads: int, device: torch.device | None = None) -> Tensor:
    """The logarithms of RetNet's decays, gamma = 1 - 2^(-5 - h) for head h (equation 8): [H] fp32."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, device=device)))


def retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32: the reference for every other form.

    Args and returns as `retention_chunked`.
    """
    (B, T, H, K), out_dtype = q.shape, v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    scale = K**-0.5 if scale is None else scale
    q, k, v = scale * q.to(dtype), k.to(dtype), v.to(dtype)
    decay = log_decay.to(dtype).exp()[:, None, None]  # [H, 1, 1]
    state = v.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]  # [B, H, K, V]
        outputs.append((q[:, t, :, :, None] * state).sum(-2))  # [B, H, V]
    return torch.stack(outputs, dim=1).to(out_dtype), state  # [B, T, H, V]


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token, for decoding.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        log_decay: [H].
        state: [B, H, K, V] fp32.
        scale: K**-0.5 by default.

    Returns:
        o [B, H, V] in v's dtype, and the new state.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = state.dtype
    update = k.to(dtype).unsqueeze(-1) * v.to(dtype).unsqueeze(-2)  # [B, H, K, V]
    state = torch.addcmul(update, log_decay.to(dtype).exp()[:, None, None], state)
    o = ((q.to(dtype) * scale).unsqueeze(-2) @ state).squeeze(-2)  # [B, H, V]
    return o.to(v.dtype), state


def retention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same recurrence as matrix products over chunks of tokens (RetNet, equation 7).

    Args:
        q, k: [B, T, H, K], any floating dtype, any strides.
        v: [B, T, H, V].
        log_decay: [H], finite, at most 0, of any size; RetNet's own are `multi_scale_log_decay(H)`.
        scale: of the scores; K**-0.5 by default.
        initial_state: [B, H, K, V]; zeros by default.
        chunk_size: most tokens in a chunk.
        output_final_state: False saves the work for a state that nobody reads.

    Returns:
        o [B, T, H, V] in v's dtype, and the state after the last token, [B, H, K, V] fp32 (fp64 for fp64 inputs),
        or None if it was not asked for. Differentiable once in every tensor argument.

    Raises:
        ValueError: chunk_size is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    B, T, H, K = q.shape
    if T == 1 and initial_state is not None:
        o, state = retention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, initial_state, scale=scale)
        return o.unsqueeze(1), state  # [B, 1, H, V]
    out_dtype = v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    scale = K**-0.5 if scale is None else scale
    C = min(chunk_size, T)
    log_decay = log_decay.to(dtype)[:, None, None]  # [H, 1, 1]
    q, k, v = to_chunks(q, C, dtype) * scale, to_chunks(k, C, dtype), to_chunks(v, C, dtype)  # [N, B, H, C, K or V]
    token = torch.arange(C, device=q.device)
    distance = token.unsqueeze(-1) - token  # [C, C]
    weights = (distance.clamp(min=0) * log_decay).exp().tril()  # [H, C, C]
    o = (q @ k.mT * weights) @ v  # [N, B, H, C, V]

    state = None
    if len(v) > 1 or initial_state is not None or output_final_state:
        lengths, behind = tokens_behind(T, C, q.device)  # [N], [N, C]
        reads = q * (log_decay * (token.unsqueeze(-1) + 1)).exp()  # the state as it reaches each token
        writes = k * (log_decay * behind[:, None, None, :, None]).exp()  # each key as it reaches the chunk's end
        decay = (log_decay * lengths[:, None, None, None, None]).exp()  # [N, 1, H, 1, 1]
        o, state = through_states(o, reads, writes, v, decay, initial_state)

    o = from_chunks(o, T).to(out_dtype)  # [B, T, H, V]
    return o, state if output_final_state else None


retention = dispatched("retention", retention_chunked)
