"""Gated linear attention: a linear recurrence whose state decays by its own factor in every key channel.

    S[t] = diag(exp(log_decay[t])) S[t-1] + k[t] v[t]^T          o[t] = scale * S[t]^T q[t]

(GLA, arXiv 2312.06635, equation 3.) `gla_recurrent` is that loop in fp32, the oracle; `gla_chunked` is the form to
train with; `gla_step` decodes one token.

B batch, T tokens, H heads, K key channels per head, V value channels per head
C tokens in a chunk, N chunks, n blocks of s tokens that a chunk is built up from
S state [K, V]; G cumulative log decay within a chunk (section 4.2's log b), so G[i] - G[j] spans tokens j+1..i

How the chunked form stays safe for any decay is told in decay.py. (The paper's secondary chunking materialises an
[L, L, K] tensor on the diagonal instead.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrm_recall.ops.chunks import from_chunks, through_states, to_chunks
from lrm_recall.ops.decay import CENTRED_LEAF, PLAIN_LEAF, centred, decay_after, join_halves, leaf_size
from lrm_recall.ops.dispatch import dispatched


def gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32: the reference for every other form.

    Args and returns as `gla_chunked`.
    """
    (B, T, H, K), out_dtype = q.shape, v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    scale = K**-0.5 if scale is None else scale
    q, k, v, decay = scale * q.to(dtype), k.to(dtype), v.to(dtype), log_decay.to(dtype).exp()
    state = v.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]  # [B, H, K, V]
        outputs.append((q[:, t, :, :, None] * state).sum(-2))  # [B, H, V]
    return torch.stack(outputs, dim=1).to(out_dtype), state  # [B, T, H, V]


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token, for decoding.

    Args:
        q, k, log_decay: [B, H, K].
        v: [B, H, V].
        state: [B, H, K, V] fp32.
        scale: K**-0.5 by default.

    Returns:
        o [B, H, V] in v's dtype, and the new state.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = state.dtype
    update = k.to(dtype).unsqueeze(-1) * v.to(dtype).unsqueeze(-2)  # [B, H, K, V]
    state = torch.addcmul(update, log_decay.to(dtype).exp().unsqueeze(-1), state)
    o = ((q.to(dtype) * scale).unsqueeze(-2) @ state).squeeze(-2)  # [B, H, V]
    return o.to(v.dtype), state


def gla_chunked(
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
    """The same recurrence as matrix products over chunks of tokens (GLA, section 4.2).

    Args:
        q, k: [B, T, H, K], any floating dtype, any strides.
        v: [B, T, H, V].
        log_decay: [B, T, H, K], finite, at most 0, of any size.
        scale: of the scores; K**-0.5 by default.
        initial_state: [B, H, K, V]; zeros by default.
        chunk_size: most tokens in a chunk, a power of two.
        output_final_state: False saves the work for a state that nobody reads.

    Returns:
        o [B, T, H, V] in v's dtype, and the state after the last token, [B, H, K, V] fp32 (fp64 for fp64 inputs),
        or None if it was not asked for. Differentiable once in every tensor argument.

    Raises:
        ValueError: chunk_size is not a power of two.
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")
    T, K = q.shape[1], q.shape[-1]
    if T == 1 and initial_state is not None:
        o, state = gla_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], initial_state, scale=scale)
        return o.unsqueeze(1), state  # [B, 1, H, V]
    dtype = torch.promote_types(v.dtype, torch.float32)
    scale = K**-0.5 if scale is None else scale
    C = min(chunk_size, 1 << (T - 1).bit_length())
    out_dtype = v.dtype
    # The end of the last chunk is filled with k = v = 0 and no decay, which leaves the state as it is.
    q, k, v, log_decay = (to_chunks(x, C, dtype) for x in (q, k, v, log_decay))  # [N, B, H, C, K or V]
    o, reads, writes, decay = _within_chunks(q * scale, k, v, log_decay)

    state = None
    if len(o) > 1 or initial_state is not None or output_final_state:
        o, state = through_states(o, reads, writes, v, decay.mT, initial_state)
    return from_chunks(o, T).to(out_dtype), state if output_final_state else None


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything a chunk can do without knowing the state before it.

    Args:
        q, k, log_decay: [N, B, H, C, K]; v: [N, B, H, C, V].

    Returns:
        o [N, B, H, C, V], each chunk's output from a state of zeros;
        reads [N, B, H, C, K], the queries as they read the state before the chunk, q[i] exp(G[i]);
        writes [N, B, H, C, K], the keys as they reach the state after it, k[j] exp(G[C] - G[j]);
        decay [N, B, H, 1, K] of the state over the chunk, exp(G[C]).
    """
    C = q.shape[-2]
    if leaf_size(log_decay, PLAIN_LEAF) == C > 1:
        before = log_decay.cumsum(-2)  # [N, B, H, C, K]: log decay from the chunk's start through the token
        o, reads, writes = _leaves(q, k, v, before)
        decay = before[..., -1:, :].exp()  # [N, B, H, 1, K]
        return o, reads, writes * decay, decay

    size = leaf_size(log_decay, CENTRED_LEAF)
    q, k, v, log_decay = (x.unflatten(-2, (C // size, size)) for x in (q, k, v, log_decay))  # [N, B, H, n, s, K or V]
    before, after = log_decay.cumsum(-2), decay_after(log_decay)  # [N, B, H, n, s, K]
    total = before[..., -1:, :]  # [N, B, H, n, 1, K]
    o, _, _ = _leaves(q, k, v, centred(before))
    while q.shape[-2] < C:
        q, k, v, o, before, after, total = (
            x.unflatten(-3, (-1, 2)) for x in (q, k, v, o, before, after, total)
        )  # [N, B, H, n/2, 2, s or 1, K or V]: an earlier and a later half for every block of 2s tokens
        scores = (q[..., 1, :, :] * before[..., 1, :, :].exp()) @ (k[..., 0, :, :] * after[..., 0, :, :].exp()).mT
        o = torch.stack((o[..., 0, :, :], o[..., 1, :, :] + scores @ v[..., 0, :, :]), -3)
        q, k, v, o = (x.flatten(-3, -2) for x in (q, k, v, o))  # [N, B, H, n/2, 2s, K or V]
        before, after, total = join_halves(before, after, total)
    return tuple(x.squeeze(-3) for x in (o, q * before.exp(), k * after.exp(), total.exp()))


def _leaves(q: Tensor, k: Tensor, v: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks whose decay fits into one product: o [..., s, V], q exp(before) and k exp(-before) [..., s, K]."""
    grown = before.exp()
    reads, writes = grown * q, k / grown
    causal = q.new_ones(q.shape[-2], q.shape[-2]).tril_()
    return (reads @ writes.mT).mul_(causal) @ v, reads, writes


gla = dispatched("gla", gla_chunked)
