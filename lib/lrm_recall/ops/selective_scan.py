"""Mamba's recurrence, the selective scan: a state space model that decays by its own factor in every entry.

    S[t] = exp(dt[t] A) * S[t-1] + dt[t] x[t] B[t]^T        y[t] = S[t] C[t] + D x[t]

(Mamba, arXiv 2312.00752, section 3.2, algorithm 2.) `selective_scan_recurrent` is that loop in fp32, the oracle;
`selective_scan_chunked` is the form to train with; `selective_scan_step` decodes one token.

B batch (where it is a size; the tensor B is named B too, as in the paper), T tokens, E channels, N state channels
L tokens in a chunk, M chunks
S state [E, N]; inside the chunked form [N, E], so that the long dimension is the contiguous one
u what a token writes, dt x

The decay belongs to the pair (e, n), so no matrix product does the work of the loop, and what costs most is the T E N
exponentials. The chunked form leaves one fused multiply-add a token in the loop and takes everything else out of it, as
a few operations over a chunk of tokens, of so few rows that it still lies in the processor's cache. Only the states
between chunks outlive their chunk; the backward pass starts from them and computes the rest again. Nothing is divided
by a decay and no decays are summed, so any size of dt A is safe.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_recall.ops.dispatch import dispatched
from lrm_recall.ops.time_steps import time_steps

_WORKING_SET = 1 << 20  # elements of one tensor of a chunk, as many rows of the batch as that allows; 4 MB in fp32


def selective_scan_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    gate: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32: the reference for every other form.

    Args and returns as `selective_scan_chunked`.
    """
    (batch, T, E), out_dtype = x.shape, x.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    x, dt, A, B, C = (y.to(dtype) for y in (x, time_steps(dt, dt_bias), A, B, C))
    state = x.new_zeros(batch, E, A.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        decay, written = (dt[:, t].unsqueeze(-1) * A).exp(), dt[:, t] * x[:, t]  # [B, E, N], [B, E]
        state = decay * state + written.unsqueeze(-1) * B[:, t].unsqueeze(-2)  # [B, E, N]
        outputs.append((state * C[:, t].unsqueeze(-2)).sum(-1))  # [B, E]
    y = torch.stack(outputs, dim=1)  # [B, T, E]
    if D is not None:
        y = y + D.to(dtype) * x
    return _gated(y.to(out_dtype), gate), state


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, for decoding.

    Args:
        x: [B, E].
        dt: [B, E], after softplus.
        A: [E, N], negative. D: [E] or None.
        B, C: [B, N].
        state: [B, E, N] fp32.

    Returns:
        y [B, E] in x's dtype, and the new state.
    """
    dtype = state.dtype
    z, dt, A, B, C = (y.to(dtype) for y in (x, dt, A, B, C))
    update = (dt * z).unsqueeze(-1) * B.unsqueeze(-2)  # [B, E, N]
    state = torch.addcmul(update, (dt.unsqueeze(-1) * A).exp(), state)
    y = _rows(C, state.mT)  # [B, E]
    if D is not None:
        y = torch.addcmul(y, D.to(dtype), z)
    return y.to(x.dtype), state


def selective_scan_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    gate: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 32,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same recurrence with all but one operation a token taken out of the loop, and little kept for backward.

    Args:
        x: [B, T, E], any floating dtype, any strides.
        dt: [B, T, E], at least 0; or any number, where dt_bias is given.
        A: [E, N], at most 0; dt * A may have any size.
        B, C: [B, T, N].
        D: [E], the skip connection, or None.
        gate: [B, T, E]; if given, y is multiplied with silu(gate).
        dt_bias: [E]; if given, the time steps are softplus(dt + dt_bias).
        initial_state: [B, E, N]; zeros by default.
        chunk_size: L, most tokens in a chunk; no effect on the result. T/L states a row are kept for the backward pass.
        output_final_state: False to return None in the state's place.

    Returns:
        y [B, T, E] in x's dtype, and the state after the last token, [B, E, N] fp32 (fp64 for fp64 inputs), or None if
        it was not asked for. Differentiable once in every tensor argument.

    Raises:
        ValueError: chunk_size is not positive.
    """
    (batch, T, E), N, out_dtype = x.shape, A.shape[-1], x.dtype
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if T == 1 and initial_state is not None:
        y, state = selective_scan_step(x[:, 0], time_steps(dt[:, 0], dt_bias), A, B[:, 0], C[:, 0], D, initial_state)
        return _gated(y.unsqueeze(1), gate), state  # [B, 1, E]
    dtype = torch.promote_types(out_dtype, torch.float32)
    x, dt, A, B, C = (y.to(dtype) for y in (x, time_steps(dt, dt_bias), A, B, C))
    initial = x.new_zeros(batch, E, N) if initial_state is None else initial_state.to(dtype)
    L = min(chunk_size, T)
    rows = max(_WORKING_SET // (L * E * N), 1)
    groups = zip(*(y.split(rows) for y in (dt * x, dt, B, C, initial)), strict=True)
    y, state = (torch.cat(z) for z in zip(*(_Scan.apply(A, *group, L) for group in groups), strict=True))
    if D is not None:
        y = torch.addcmul(y, D.to(dtype), x)
    return _gated(y.to(out_dtype), gate), state if output_final_state else None


def _gated(y: Tensor, gate: Tensor | None) -> Tensor:
    return y if gate is None else y * F.silu(gate)


class _Scan(torch.autograd.Function):
    """A [E, N], u and dt [B, T, E], B and C [B, T, N], state [B, E, N] to y [B, T, E] and the last state [B, E, N]."""

    @staticmethod
    def forward(
        ctx, A: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        u, dt, B, C = (y.transpose(0, 1) for y in (u, dt, B, C))  # [T, B, E or N]
        A, state = A.mT.contiguous(), state.mT  # [N, E], [B, N, E]
        chunks = _chunks(len(u), chunk_size)
        y, decay, states = torch.empty_like(u), *u.new_empty(2, chunk_size, *state.shape)
        boundaries = u.new_empty(len(chunks), *state.shape)  # [M, B, N, E], the state before each chunk
        for m, chunk in enumerate(chunks):
            boundaries[m] = state
            L = chunk.stop - chunk.start
            _decays(dt[chunk], A, out=decay[:L])
            state = _states(decay[:L], u[chunk], B[chunk], boundaries[m], out=states[:L])
            y[chunk] = _rows(C[chunk], states[:L])
        ctx.save_for_backward(A, u, dt, B, C, boundaries)
        ctx.chunk_size = chunk_size
        return y.transpose(0, 1), state.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        A, u, dt, B, C, boundaries = ctx.saved_tensors
        grad_y = grad_y.transpose(0, 1)  # [T, B, E]
        grad_A, grad_u, grad_dt, grad_B, grad_C = torch.zeros_like(A), *(torch.empty_like(y) for y in (u, dt, B, C))
        decay, grads, product, states = u.new_empty(4, ctx.chunk_size + 1, *boundaries.shape[1:])
        later = grad_state.mT  # [B, N, E], of the state after a chunk, through all that reads it
        for m, chunk in reversed([*enumerate(_chunks(len(u), ctx.chunk_size))]):
            L = chunk.stop - chunk.start
            states[0] = boundaries[m]
            _decays(dt[chunk], A, out=decay[:L])
            _states(decay[:L], u[chunk], B[chunk], states[0], out=states[1 : L + 1])
            # The gradient of each state: what its own output reads of it, and what is left of it in the next state.
            torch.mul(C[chunk].unsqueeze(-1), grad_y[chunk].unsqueeze(-2), out=grads[:L])  # [L, B, N, E]
            grads[L - 1] += later
            _scan_back(decay[:L], grads[:L])
            later = decay[0] * grads[0]  # [B, N, E]

            grad_C[chunk] = _rows(grad_y[chunk], states[1 : L + 1].mT)  # [L, B, N]
            grad_B[chunk] = _rows(u[chunk], grads[:L].mT)  # [L, B, N]
            grad_u[chunk] = _rows(B[chunk], grads[:L])  # [L, B, E]
            log_decay = grads[:L].mul_(decay[:L]).mul_(states[:L])  # the gradient of dt A
            grad_dt[chunk] = torch.mul(log_decay, A, out=product[:L]).sum(-2)  # [L, B, E]
            grad_A += log_decay.mul_(dt[chunk].unsqueeze(-2)).sum((0, 1))  # [N, E]
        return grad_A.mT, *(y.transpose(0, 1) for y in (grad_u, grad_dt, grad_B, grad_C)), later.mT, None


def _chunks(T: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, T)) for start in range(0, T, chunk_size)]


def _decays(dt: Tensor, A: Tensor, out: Tensor) -> Tensor:
    """exp(dt A): dt [L, B, E], A [N, E], out [L, B, N, E]."""
    return torch.mul(dt.unsqueeze(-2), A, out=out).exp_()


def _rows(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows [..., i] times matrices [..., i, j]: [..., j]; a product with columns would be ten times slower on a CPU."""
    return (rows.unsqueeze(-2) @ matrices).squeeze(-2)


def _states(decay: Tensor, u: Tensor, B: Tensor, before: Tensor, out: Tensor) -> Tensor:
    """Every state of a chunk into out [L, B, N, E]; the last one [B, N, E].

    Args:
        decay: [L, B, N, E]. u: [L, B, E]. B: [L, B, N].
        before: [B, N, E], the state before the chunk.
    """
    torch.mul(B.unsqueeze(-1), u.unsqueeze(-2), out=out)  # [L, B, N, E]
    for left, state in zip(decay.unbind(), out.unbind(), strict=True):
        before = state.addcmul_(left, before)
    return before


def _scan_back(decay: Tensor, grads: Tensor) -> None:
    """grads[t] += decay[t+1] * grads[t+1], from the end; both [L, B, N, E]."""
    decay, grads = decay.unbind(), grads.unbind()
    for t in range(len(grads) - 2, -1, -1):
        grads[t].addcmul_(decay[t + 1], grads[t + 1])


selective_scan = dispatched("selective_scan", selective_scan_chunked)
