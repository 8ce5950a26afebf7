"""RWKV5's recurrence: a state that decays by a constant factor per key channel, and a bonus for the token itself.

    o[t] = (S[t-1] + diag(u) k[t] v[t]^T)^T r[t]          S[t] = diag(exp(log_decay)) S[t-1] + k[t] v[t]^T

(Eagle, arXiv 2404.05892, its time mixing.) A token reads the state before its own write, and itself with the weight u.
`rwkv5_recurrent` is that loop in fp32, the oracle; `rwkv5_chunked` is the form to train with; `rwkv5_step` decodes one
token.

B batch, T tokens, H heads, K key channels per head (r the receptance, a query), V value channels per head
C tokens in a chunk, N chunks, n blocks of s tokens that a chunk is built up from
S state [K, V]; u bonus [H, K]

How the chunked form stays safe for any decay is told in decay.py. As this decay is constant, the factors that decay.py
sums up token by token are powers: one table [H, s, K] serves all blocks of s tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrm_recall.ops.chunks import from_chunks, through_states, to_chunks, tokens_behind
from lrm_recall.ops.decay import CENTRED_LEAF, leaf_size
from lrm_recall.ops.dispatch import dispatched


def rwkv5_recurrent(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32: the reference for every other form.

    Args and returns as `rwkv5_chunked`.
    """
    (B, T, H, K), out_dtype = r.shape, v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    r, k, v = r.to(dtype), k.to(dtype), v.to(dtype)
    decay, bonus = log_decay.to(dtype).exp().unsqueeze(-1), bonus.to(dtype).unsqueeze(-1)  # [H, K, 1]
    state = v.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        write = k[:, t, :, :, None] * v[:, t, :, None, :]  # [B, H, K, V]
        outputs.append((r[:, t, :, :, None] * (state + bonus * write)).sum(-2))  # [B, H, V]
        state = decay * state + write
    return torch.stack(outputs, dim=1).to(out_dtype), state  # [B, T, H, V]


def rwkv5_step(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, for decoding.

    Args:
        r, k: [B, H, K].
        v: [B, H, V].
        log_decay, bonus: [H, K].
        state: [B, H, K, V] fp32.

    Returns:
        o [B, H, V] in v's dtype, and the new state.
    """
    dtype = state.dtype
    r, log_decay, bonus = r.to(dtype), log_decay.to(dtype), bonus.to(dtype)
    write = k.to(dtype).unsqueeze(-1) * v.to(dtype).unsqueeze(-2)  # [B, H, K, V]
    o = r.unsqueeze(-2) @ torch.addcmul(state, bonus.unsqueeze(-1), write)  # [B, H, 1, V]
    state = torch.addcmul(write, log_decay.exp().unsqueeze(-1), state)
    return o.squeeze(-2).to(v.dtype), state


def rwkv5_chunked(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same recurrence as matrix products over chunks of tokens.

    Args:
        r, k: [B, T, H, K], any floating dtype, any strides.
        v: [B, T, H, V].
        log_decay: [H, K], finite, at most 0, of any size; RWKV5 learns w in -exp(w).
        bonus: [H, K].
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
    T, out_dtype = r.shape[1], v.dtype
    if T == 1 and initial_state is not None:
        o, state = rwkv5_step(r[:, 0], k[:, 0], v[:, 0], log_decay, bonus, initial_state)
        return o.unsqueeze(1), state  # [B, 1, H, V]
    dtype = torch.promote_types(out_dtype, torch.float32)
    C = min(chunk_size, 1 << (T - 1).bit_length())
    log_decay, bonus = log_decay.to(dtype).unsqueeze(-2), bonus.to(dtype).unsqueeze(-2)  # [H, 1, K]
    r, k, v = (to_chunks(x, C, dtype) for x in (r, k, v))  # [N, B, H, C, K or V]
    o = torch.addcmul(_within_chunks(r, k, v, log_decay), (r * bonus * k).sum(-1, keepdim=True), v)  # [N, B, H, C, V]

    state = None
    if len(v) > 1 or initial_state is not None or output_final_state:
        lengths, behind = tokens_behind(T, C, r.device)  # [N], [N, C]
        reads = r * (log_decay * _before(C, r.device)).exp()  # the state as it reaches each token
        writes = k * (log_decay * behind[:, None, None, :, None]).exp()  # each key as it reaches the chunk's end
        decay = (log_decay * lengths[:, None, None, None, None]).exp()  # [N, 1, H, 1, K]
        o, state = through_states(o, reads, writes, v, decay.mT, initial_state)

    o = from_chunks(o, T).to(out_dtype)  # [B, T, H, V]
    return o, state if output_final_state else None


def _within_chunks(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """What every token reads of the tokens before it in its own chunk.

    Args:
        r, k: [N, B, H, C, K]; v: [N, B, H, C, V]; log_decay: [H, 1, K].

    Returns:
        [N, B, H, C, V].
    """
    C = r.shape[-2]
    size = leaf_size(log_decay.expand(-1, C, -1), CENTRED_LEAF)
    r, k, v = (x.unflatten(-2, (C // size, size)) for x in (r, k, v))  # [N, B, H, n, s, K or V]
    log_decay = log_decay.unsqueeze(-3)  # [H, 1, 1, K]
    before = _before(size, r.device)  # [s, 1]
    # Token i reads token j < i through exp((i - j - 1) log_decay), split in the leaf's middle. The first token reads
    # nothing and the last is not read: clamped, they do not reach farther than the others, and a leaf of 1 is safe.
    reads = r * (log_decay * (before.clamp(min=1) - size / 2)).exp()
    writes = k * (log_decay * (size / 2 - 1 - before.clamp(max=size - 2))).exp()
    earlier = r.new_ones(size, size).tril_(-1)
    o = (reads @ writes.mT).mul_(earlier) @ v  # [N, B, H, n, s, V]
    while size < C:
        r, k, v, o = (x.unflatten(-3, (-1, 2)) for x in (r, k, v, o))  # [N, B, H, n/2, 2, s, K or V]
        reads = r[..., 1, :, :] * (log_decay * before).exp()  # from the border between the halves
        writes = k[..., 0, :, :] * (log_decay * before.flip(0)).exp()  # to the border
        o = torch.stack((o[..., 0, :, :], o[..., 1, :, :] + reads @ writes.mT @ v[..., 0, :, :]), -3)
        r, k, v, o = (x.flatten(-3, -2) for x in (r, k, v, o))  # [N, B, H, n/2, 2s, K or V]
        size *= 2
        before = _before(size, r.device)
    return o.squeeze(-3)


def _before(size: int, device: torch.device) -> Tensor:
    """How many tokens of a block stand before each: [s, 1]."""
    return torch.arange(size, device=device).unsqueeze(-1)


rwkv5 = dispatched("rwkv5", rwkv5_chunked)
