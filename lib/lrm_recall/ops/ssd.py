"""Mamba2's recurrence: a state space model whose state decays by one factor per head.

    S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]^T        y[t] = S[t] C[t] + D x[t]

(Mamba2, arXiv 2405.21060, section 2.) `ssd_recurrent` is that loop in fp32, the oracle; `ssd_chunked` is the form to
train with (section 6); `ssd_step` decodes one token.

B batch (where it is a size; the tensor B is named B too, as in the paper), T tokens, H heads, G groups of heads that
share B and C, R heads in a group, P channels per head, N state channels, L tokens in a chunk, M chunks
S state [P, N]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_recall.ops.scan import chunk_scan


class _WithinChunks(torch.autograd.Function):
    """y[i] = sum over j <= i of exp(log_decay[j+1] + ... + log_decay[i]) * scores[i, j] * written[j], in each chunk.

    Each exponent is a sum of its own (the segment sum of section 6, listing 1). The backward pass is written out to
    keep one [L, L] matrix per head instead of four.
    """

    @staticmethod
    def forward(ctx, log_decay: Tensor, scores: Tensor, written: Tensor) -> Tensor:
        """log_decay [B, M, H, L], scores [B, M, G, L, L], written [B, M, H, L, P] to y [B, M, H, L, P]."""
        L = log_decay.shape[-1]
        below = log_decay.new_ones(L, L).tril_(-1)
        decay = (log_decay.unsqueeze(-1) * below).cumsum_(-2).exp_()  # [B, M, H, L, L], 1 above the diagonal
        scores, written = scores.tril(), written.contiguous()
        ctx.save_for_backward(decay, scores, written)
        return _per_head(decay, scores).flatten(2, 3) @ written

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, scores, written = ctx.saved_tensors
        grad = grad.contiguous()
        grad_written = _per_head(decay, scores).flatten(2, 3).mT @ grad
        grad_decay = (grad @ written.mT).mul_(decay)  # [B, M, H, L, L], times the decay: what exp passes on
        grouped = grad_decay.unflatten(2, (scores.shape[2], -1))  # [B, M, G, R, L, L]
        grad_scores = grouped.sum(3).tril_()
        grouped.mul_(scores.tril(-1).unsqueeze(3))
        # Exponent (i, j) holds the tokens j+1..i, so token l gets the sum over i >= l > j.
        grad_log_decay = (grad_decay.sum(-1) - grad_decay.sum(-2)).flip(-1).cumsum(-1).flip(-1)
        return grad_log_decay, grad_scores, grad_written


def _per_head(decay: Tensor, scores: Tensor) -> Tensor:
    """decay [B, M, H, L, L] times the scores [B, M, G, L, L] of each head's group: [B, M, G, R, L, L]."""
    return decay.unflatten(2, (scores.shape[2], -1)) * scores.unsqueeze(3)


def ssd_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token in fp32: the reference for every other form.

    Args and returns as `ssd_chunked`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, T, H, P = x.shape
    state = x.new_zeros(batch, H, P, B.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        y, state = ssd_step(x[:, t].to(dtype), dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1).to(x.dtype), state  # [B, T, H, P]


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token.

    Args:
        x: [B, H, P].
        dt: [B, H], after softplus.
        A: [H], negative. D: [H] or None.
        B, C: [B, G, N].
        state: [B, H, P, N] fp32.

    Returns:
        y [B, H, P] in x's dtype, and the new state.
    """
    dtype, groups = state.dtype, B.shape[-2]
    batch, H, P = x.shape
    z, dt, B, C = x.to(dtype), dt.to(dtype), B.to(dtype), C.to(dtype)
    write = (z * dt.unsqueeze(-1)).view(batch, groups, -1, 1)  # [B, G, R*P, 1]
    update = (write * B.unsqueeze(-2)).view(state.shape)  # [B, H, P, N]
    state = torch.addcmul(update, (dt * A).exp()[..., None, None], state)
    y = state.view(batch, groups, -1, state.shape[-1]) @ C.unsqueeze(-1)  # [B, G, R*P, 1]
    y = y.view(batch, H, P)
    if D is not None:
        y = torch.addcmul(y, D.unsqueeze(-1).to(dtype), z)
    return y.to(x.dtype), state


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same recurrence as matrix products over chunks of tokens (Mamba2, section 6).

    Args:
        x: [B, T, H, P], any floating dtype, any strides.
        dt: [B, T, H], after softplus: at least 0.
        A: [H], at most 0; dt * A may have any finite size.
        B, C: [B, T, G, N], G dividing H.
        D: [H], the skip connection, or None.
        initial_state: [B, H, P, N]; zeros by default.
        chunk_size: most tokens in a chunk.
        output_final_state: False saves the work for a state that nobody reads.

    Returns:
        y [B, T, H, P] in x's dtype, and the state after the last token, [B, H, P, N] fp32 (fp64 for fp64 inputs), or
        None if it was not asked for. Differentiable once in every tensor argument.

    Raises:
        ValueError: chunk_size is not positive, or the groups do not divide the heads.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[-2:]
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if H % G:
        raise ValueError(f"the groups of B and C must divide the heads: got {G} groups, {H} heads")
    dtype, R = torch.promote_types(x.dtype, torch.float32), H // G
    L = min(chunk_size, T)
    M = -(-T // L)
    R = H // G
    L = min(chunk_size, T)
    M = -(-T // L)
    skip, dtype = x, torch.promote_types(x.dtype, torch.float32)
    # The end of the last chunk is filled with dt = 0, which neither decays the state nor adds to it.
    x, dt, B, C = (_to_chunks(y, M, L, dtype) for y in (x, dt, B, C))  # [B, M, L, H or G, ...]
    log_decay = (dt * A.to(dtype)).transpose(2, 3).contiguous()  # [B, M, H, L]
    written = x * dt.unsqueeze(-1)  # [B, M, L, H, P]
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # [B, M, G, L, N]
    y = _WithinChunks.apply(log_decay, C @ B.mT, written.transpose(2, 3)).transpose(2, 3)  # [B, M, L, H, P]

    state = None
    if M > 1 or initial_state is not None or output_final_state:
        if initial_state is None:
            initial_state = x.new_zeros(batch, H, P, N)
        # Decay from behind a token to the chunk's end: a sum of its own, as a difference of long sums loses digits.
        to_end = F.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1).exp()  # [B, M, H, L]
        from_start = log_decay.cumsum(-1).exp()  # [B, M, H, L]
        written = written * to_end.transpose(2, 3).unsqueeze(-1)  # [B, M, L, H, P]
        written = written.view(batch, M, L, G, R * P).transpose(2, 3)  # [B, M, G, L, R*P]
        update = (written.mT @ B).view(batch, M, H, P, N)
        over_chunk = from_start[..., -1, None, None]  # [B, M, H, 1, 1]
        states = chunk_scan(over_chunk.transpose(0, 1), update.transpose(0, 1), initial_state.to(dtype))
        state = states[-1]  # [B, H, P, N]
        before = states[:-1].transpose(0, 1).reshape(batch, M, G, R * P, N)
        read = (C @ before.mT).transpose(2, 3).reshape(batch, M, L, H, P)
        y = torch.addcmul(y, read, from_start.transpose(2, 3).unsqueeze(-1))

    y = y.reshape(batch, M * L, H, P)[:, :T]
    if D is not None:
        y = torch.addcmul(y, skip.to(dtype), D.to(dtype).unsqueeze(-1))
    return y.to(skip.dtype), state if output_final_state else None


def _to_chunks(x: Tensor, num_chunks: int, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, ...] to [B, M, L, ...], with zeros behind the last token."""
    missing = num_chunks * chunk_size - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))  # [B, M*L, ...]
    return x.unflatten(1, (num_chunks, chunk_size)).to(dtype)
