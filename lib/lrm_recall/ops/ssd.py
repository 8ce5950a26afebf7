"""Mamba2's recurrence: a state space model whose state decays by one factor per head.

    S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]^T        y[t] = S[t] C[t] + D x[t]

(Mamba2, arXiv 2405.21060, section 2.) `ssd_recurrent` is that loop in fp32, the oracle; `ssd_chunked` is the form to
train with (section 6); `ssd_step` decodes one token.

B batch (where it is a size; the tensor B is named B too, as in the paper), T tokens, H heads, G groups of heads that
share B and C, R heads in a group, P channels per head, N state channels
L tokens in a chunk, M chunks, n blocks of s tokens that a chunk is built up from
S state [P, N]; between chunks [N, R*P] for each group, which makes one product of all its heads

How the chunked form stays safe for any decay is told in decay.py. It has no [L, L] matrix per head, either: as C and
B belong to a group and the decay to a head, decays go onto the rows of x and y, and C B^T serves all heads at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.ops.decay import CENTRED_LEAF, PLAIN_LEAF, centred, decay_after, join_halves, leaf_size
from lrm_recall.ops.dispatch import dispatched
from lrm_recall.ops.scan import chunk_scan
from lrm_recall.ops.time_steps import time_steps


def ssd_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32: the reference for every other form.

    Args and returns as `ssd_chunked`.
    """
    (batch, T, H, P), (G, N), out_dtype = x.shape, B.shape[-2:], x.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    dt = time_steps(dt, dt_bias)
    x, dt, A, B, C = (y.to(dtype) for y in (x, dt, A, B, C))
    B, C = B.repeat_interleave(H // G, dim=2), C.repeat_interleave(H // G, dim=2)  # [B, T, H, N]
    decay, written = (dt * A).exp(), dt.unsqueeze(-1) * x  # [B, T, H], [B, T, H, P]
    state = x.new_zeros(batch, H, P, N) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        state = decay[:, t, :, None, None] * state + written[:, t, :, :, None] * B[:, t, :, None, :]  # [B, H, P, N]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))  # [B, H, P]
    y = torch.stack(outputs, dim=1)  # [B, T, H, P]
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * x
    return y.to(out_dtype), state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, for decoding.

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
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same recurrence as matrix products over chunks of tokens (Mamba2, section 6).

    Args:
        x: [B, T, H, P], any floating dtype, any strides.
        dt: [B, T, H], at least 0; or any number, where dt_bias is given.
        A: [H], at most 0; dt * A may have any finite size.
        B, C: [B, T, G, N], G dividing H.
        D: [H], the skip connection, or None.
        dt_bias: [H]; if given, the time steps are softplus(dt + dt_bias).
        initial_state: [B, H, P, N]; zeros by default.
        chunk_size: most tokens in a chunk, a power of two.
        output_final_state: False saves the work for a state that nobody reads.

    Returns:
        y [B, T, H, P] in x's dtype, and the state after the last token, [B, H, P, N] fp32 (fp64 for fp64 inputs), or
        None if it was not asked for. Differentiable once in every tensor argument.

    Raises:
        ValueError: chunk_size is not a power of two, or the groups do not divide the heads.
    """
    (batch, T, H, P), (G, N), out_dtype = x.shape, B.shape[-2:], x.dtype
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")
    if H % G:
        raise ValueError(f"the groups of B and C must divide the heads: got {G} groups, {H} heads")
    dt = time_steps(dt, dt_bias)
    if T == 1 and initial_state is not None:
        y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, initial_state)
        return y.unsqueeze(1), state  # [B, 1, H, P]
    dtype = torch.promote_types(out_dtype, torch.float32)
    L = min(chunk_size, 1 << (T - 1).bit_length())
    M = -(-T // L)
    # The end of the last chunk is filled with dt = 0, which neither decays the state nor adds to it.
    x, dt, B, C = (_to_chunks(y, M, L, dtype) for y in (x, dt, B, C))  # [B, M, L, H or G, ...]
    log_decay = dt * A.to(dtype)  # [B, M, L, H]
    whole = leaf_size(log_decay, PLAIN_LEAF) == L > 1
    if whole:
        before = log_decay.cumsum(2)  # [B, M, L, H]: log decay from the chunk's start through the token
        within, rows = _leaves(x, dt, B, C, before)  # [B, M, G, L, R*P], yet to be multiplied by exp(before)
    else:
        within, rows, before = _doubling(x, dt, B, C, log_decay)
    reads = before.exp().unsqueeze(-1)  # [B, M, L, H, 1]: what is left of the state before the chunk

    state, read = None, None
    if M > 1 or initial_state is not None or output_final_state:
        decay = _by_group(reads[:, :, -1:].expand(batch, M, 1, H, P), G)  # [B, M, G, 1, R*P]
        if whole:
            rows = rows * decay  # from the chunk's start to its end
        if initial_state is None:
            initial_state = x.new_zeros(batch, H, P, N)
        states = chunk_scan(
            decay.transpose(0, 1),
            B.permute(1, 0, 3, 2, 4),  # [M, B, G, L, N]
            rows.transpose(0, 1),
            initial_state.to(dtype).reshape(batch, G, -1, N).mT,  # [B, G, N, R*P]
        )  # [M+1, B, G, N, R*P]
        state = states[-1].mT.reshape(batch, H, P, N).clone()  # a view would keep the states of all chunks
        read = C.transpose(2, 3) @ states[:-1].transpose(0, 1)  # [B, M, G, L, R*P]

    if whole:
        y = _by_head(within if read is None else within.add_(read), H) * reads  # [B, M, L, H, P]
    else:
        y = within if read is None else torch.addcmul(within, _by_head(read, H), reads)
    if D is not None:
        y = y.addcmul_(x, D.to(dtype).unsqueeze(-1))
    y = y.reshape(batch, M * L, H, P)[:, :T].to(out_dtype)
    return y, state if output_final_state else None


def _to_chunks(x: Tensor, num_chunks: int, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, ...] to [B, M, L, ...], with zeros behind the last token."""
    missing = num_chunks * chunk_size - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))  # [B, M*L, ...]
    return x.unflatten(1, (num_chunks, chunk_size)).to(dtype)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[..., s, H, P] to [..., G, s, R*P]: all heads of a group side by side."""
    *lead, H, P = x.shape
    return x.reshape(*lead, groups, H // groups * P).transpose(-3, -2)


def _by_head(y: Tensor, heads: int) -> Tensor:
    """[..., G, s, R*P] to [..., s, H, P]."""
    y = y.transpose(-3, -2)  # [..., s, G, R*P]
    return y.reshape(*y.shape[:-2], heads, -1)


def _leaves(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks whose decay fits into one product.

    Args:
        x: [..., s, H, P]. dt, before: [..., s, H]. B, C: [..., s, G, N].

    Returns:
        [..., G, s, R*P] the outputs, yet to be multiplied by exp(before), and the rows dt x exp(-before).
    """
    s, G = B.shape[-3:-1]
    rows = _by_group(x * (dt * (-before).exp()).unsqueeze(-1), G)  # [..., G, s, R*P]
    scores = C.transpose(-3, -2) @ B.transpose(-3, -2).mT  # [..., G, s, s]
    return scores.mul_(scores.new_ones(s, s).tril_()) @ rows, rows


def _doubling(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks out of leaves.

    Args:
        x: [B, M, L, H, P]. dt, log_decay: [B, M, L, H]. B, C: [B, M, L, G, N].

    Returns:
        [B, M, L, H, P] the outputs from a state of zeros; [B, M, G, L, R*P] the rows dt x as they reach the chunk's
        end; [B, M, L, H] the log decay from the chunk's start through the token.
    """
    L, H, G = *x.shape[2:4], B.shape[-2]
    size = leaf_size(log_decay, CENTRED_LEAF)
    x, dt, B, C, log_decay = (z.unflatten(2, (L // size, size)) for z in (x, dt, B, C, log_decay))  # [B, M, n, s, ...]
    before, after = log_decay.cumsum(-2), decay_after(log_decay)  # [B, M, n, s, H]
    total = before[..., -1:, :]  # [B, M, n, 1, H]
    inner = centred(before)
    y = _by_head(_leaves(x, dt, B, C, inner)[0], H) * inner.exp().unsqueeze(-1)  # [B, M, n, s, H, P]
    while x.shape[3] < L:
        x, dt, B, C, y, before, after, total = (
            z.unflatten(2, (-1, 2)) for z in (x, dt, B, C, y, before, after, total)
        )  # [B, M, n/2, 2, s, ...]: an earlier and a later half for every block of 2s tokens
        rows = _by_group(x[:, :, :, 0] * (dt[:, :, :, 0] * after[:, :, :, 0].exp()).unsqueeze(-1), G)
        scores = C[:, :, :, 1].transpose(-3, -2) @ B[:, :, :, 0].transpose(-3, -2).mT  # [B, M, n/2, G, s, s]
        seen = _by_head(scores @ rows, H)  # [B, M, n/2, s, H, P]
        y = torch.stack((y[:, :, :, 0], torch.addcmul(y[:, :, :, 1], seen, before[:, :, :, 1].exp().unsqueeze(-1))), 3)
        x, dt, B, C, y = (z.flatten(3, 4) for z in (x, dt, B, C, y))  # [B, M, n/2, 2s, ...]
        before, after, total = join_halves(before, after, total)
    x, dt, y, before, after = (z.squeeze(2) for z in (x, dt, y, before, after))
    return y, _by_group(x * (dt * after.exp()).unsqueeze(-1), G), before


ssd = dispatched("ssd", ssd_chunked)
