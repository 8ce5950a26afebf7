"""The diagonal state space model of S4D (arXiv 2206.11893) and H3 (arXiv 2212.14052), the same at every step.

    s[t] = decay * s[t-1] + write * u[t]        y[t] = 2 Re(sum over n of read[n] * s[t, n]) + skip * u[t]

The states come in conjugate pairs, of which one is kept, hence 2 Re. From zeros, y is a convolution of u with a sum of
exponentials, 2 Re(sum over n of read[n] * write[n] * decay[n]^lag).

B batch, T tokens, H channels, N complex states per channel, S and A the numbers of fine and coarse powers
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.ops.conv import long_conv


def diagonal_ssm_recurrent(
    u: Tensor,
    decay: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """One token after another: the definition. Arguments and results as for `diagonal_ssm`."""
    B, T, H = u.shape
    state = initial_state
    if state is None:
        state = u.new_zeros(B, H, decay.shape[1], dtype=_state_dtype(u))
    outputs = []
    for t in range(T):
        y, state = diagonal_ssm_step(u[:, t], decay, write, read, skip, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state if output_final_state else None


def diagonal_ssm_step(
    u: Tensor, decay: Tensor, write: Tensor, read: Tensor, skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: u [B, H] and the state before it [B, H, N] to y [B, H] and the state after it."""
    decay, write, read = (p.to(state.dtype) for p in (decay, write, read))
    state = torch.addcmul(decay * state, write, u.unsqueeze(-1).to(state.dtype))  # [B, H, N]
    y = 2 * (read * state).real.sum(-1) + skip * u
    return y.to(u.dtype), state


def diagonal_ssm(
    u: Tensor,
    decay: Tensor,
    write: Tensor,
    read: Tensor,
    skip: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """All tokens at once, as a convolution; a single one with an initial state by the recurrence.

    Args:
        u: [B, T, H].
        decay, write, read: [H, N] complex, |decay| < 1; best in complex128, whose powers are exact enough.
        skip: [H].
        initial_state: [B, H, N] complex; zeros by default.
        output_final_state: whether to return the state after the last token, or None.

    Returns:
        y [B, T, H] in u's dtype; state [B, H, N] in complex64 (complex128 for fp64). Differentiable once.
    """
    T = u.shape[1]
    if T == 1 and initial_state is not None:
        y, state = diagonal_ssm_step(u[:, 0], decay, write, read, skip, initial_state)
        return y.unsqueeze(1), state if output_final_state else None
    dtype = _state_dtype(u)
    powers = tuple(p.to(dtype) for p in _powers(decay, T))
    decay, write, read = (p.to(dtype) for p in (decay, write, read))
    kernel = _sum_of_exponentials(read * write, powers, T)  # [H, T]
    kernel = torch.cat((kernel[:, :1] + skip.unsqueeze(-1), kernel[:, 1:]), dim=-1)
    y = long_conv(u, kernel.T)
    if initial_state is not None:
        y = y + _sum_of_exponentials(read * decay * initial_state, powers, T).mT.to(y.dtype)
    state = _final_state(u, write, powers, initial_state) if output_final_state else None
    return y, state


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.complex128 if u.dtype == torch.float64 else torch.complex64


def _powers(base: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Powers 0..S-1 of base [H, N], and powers 0, S, 2S, ... up to at least T: [H, S, N] and [H, A, N].

    Every power up to T is a product of one of each, so about 2 sqrt(T) of them are made instead of T.
    """
    S = 1 << ((T.bit_length() + 1) // 2)
    fine, leap = _geometric(base, S)
    return fine, _geometric(leap, T // S + 1)[0]


def _geometric(base: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Powers 0..count-1 of base [H, N] by doubling, [H, count, N]; and base^count where count is a power of two."""
    series, step = torch.ones_like(base).unsqueeze(1), base  # [H, 1, N], [H, N]
    while series.shape[1] < count:
        series = torch.cat((series, series * step.unsqueeze(1)), dim=1)
        step = step * step
    return series[:, :count], step


def _sum_of_exponentials(weights: Tensor, powers: tuple[Tensor, Tensor], T: int) -> Tensor:
    """2 Re(sum over n of weights[n] * base[n]^t) for t < T: weights [..., H, N] to [..., H, T]."""
    fine, coarse = powers
    # Re(a b) is the scalar product of conj(a) and b as pairs of reals.
    left = torch.view_as_real((weights.unsqueeze(-2) * coarse).conj_physical()).flatten(-2)  # [..., H, A, 2N]
    right = torch.view_as_real(fine).flatten(-2)  # [H, S, 2N]
    with torch.autocast(right.device.type, enabled=False):  # in bfloat16 the exact powers were of no use
        return 2 * (left @ right.mT).flatten(-2)[..., :T]  # [..., H, A*S] -> [..., H, T]


def _final_state(u: Tensor, write: Tensor, powers: tuple[Tensor, Tensor], initial_state: Tensor | None) -> Tensor:
    """write * (sum over t of decay^(T-1-t) * u[t]) + decay^T * initial_state: [B, H, N]."""
    B, T, H = u.shape
    fine, coarse = powers
    S, A = fine.shape[1], coarse.shape[1]
    backwards = F.pad(u.flip(1), (0, 0, 0, A * S - T)).to(fine.real.dtype)  # [B, A*S, H], from the last token
    rows = backwards.permute(2, 0, 1).reshape(H, B * A, S)
    with torch.autocast(rows.device.type, enabled=False):
        sums = rows @ torch.view_as_real(fine).flatten(-2)  # [H, B*A, 2N]
    sums = torch.view_as_complex(sums.unflatten(-1, (-1, 2)))  # [H, B*A, N]
    state = (sums.unflatten(1, (B, A)) * coarse.unsqueeze(1)).sum(2) * write.unsqueeze(1)  # [H, B, N]
    state = state.transpose(0, 1)  # [B, H, N]
    if initial_state is not None:
        state = state + fine[:, T % S] * coarse[:, T // S] * initial_state
    return state.contiguous()
