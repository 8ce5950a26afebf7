"""RWKV4's recurrence: a running average of the values, weighted by exp(k), that fades and favours the token itself.

    wkv[t] = (A[t-1] + exp(u + k[t]) v[t]) / (B[t-1] + exp(u + k[t]))
    A[t] = exp(d) A[t-1] + exp(k[t]) v[t]          B[t] = exp(d) B[t-1] + exp(k[t])          d = -exp(w)

(RWKV, arXiv 2305.13048, the WKV operator.) `rwkv4_recurrent` is that loop in fp32, the oracle; `rwkv4_chunked` is the
form to train with; `rwkv4_step` decodes one token.

B batch (where it is a size), T tokens, D channels, all apart from each other; C tokens in a chunk, N chunks
state [3, D]: a, b and p, which stand for A = exp(p) a and B = exp(p) b

exp(k) and the sums of it have no bounds, so every sum is kept over exp(p), p the largest log weight in it: with that
no exponent is positive, and no sum of weights is below 1. p changes no result and takes no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_recall.ops.dispatch import dispatched

NOTHING = -1e38  # log weight of what does not count: finite, as the difference of two infinities is not a number


def rwkv4_recurrent(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32: the reference for every other form.

    Args and returns as `rwkv4_chunked`.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    state = empty_state(v) if initial_state is None else initial_state.to(dtype)
    w, u, k, values = (x.to(dtype) for x in (w, u, k, v))
    outputs = []
    for t in range(v.shape[1]):
        o, state = rwkv4_step(w, u, k[:, t], values[:, t], state)
        outputs.append(o)
    return torch.stack(outputs, dim=1).to(v.dtype), state  # [B, T, D]


def rwkv4_step(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, for decoding.

    Args:
        w, u: [D].
        k, v: [B, D].
        state: [B, 3, D] fp32.

    Returns:
        wkv [B, D] in v's dtype, and the new state.
    """
    dtype = state.dtype
    k, value = k.to(dtype), v.to(dtype)
    a, b, p = state.unbind(1)  # [B, D] each
    now = torch.ones_like(value)
    (total, weight), _ = _add((a, b), p, (value, now), u.to(dtype) + k)
    (a, b), p = _add((a, b), p - w.to(dtype).exp(), (value, now), k)
    return (total / weight).to(v.dtype), torch.stack((a, b, p), dim=1)


def rwkv4_chunked(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same recurrence, all chunks at once: the steps one after the other are those of a chunk and those of chunks.

    Args:
        w: [D], finite; a state decays by exp(-exp(w)).
        u: [D], the bonus of the token itself, in logs.
        k: [B, T, D] log weights, of any finite size; NOTHING for a token that does not count.
        v: [B, T, D], any floating dtype.
        initial_state: [B, 3, D], see above; `empty_state` by default.
        chunk_size: tokens in a chunk.
        output_final_state: False for a state that nobody reads.

    Returns:
        wkv [B, T, D] in v's dtype, and the state after the last token, [B, 3, D] fp32 (fp64 for fp64 inputs), or None
        if it was not asked for. Differentiable once in every tensor argument; the state's p is a constant.

    Raises:
        ValueError: chunk_size is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if v.shape[1] == 1 and initial_state is not None:
        o, state = rwkv4_step(w, u, k[:, 0], v[:, 0], initial_state)
        return o.unsqueeze(1), state  # [B, 1, D]
    state = empty_state(v) if initial_state is None else initial_state
    dtype = torch.promote_types(v.dtype, torch.float32)
    w, u, k, values, state = (x.to(dtype) for x in (w, u, k, v, state))
    o, state = _WKV.apply(-w.exp(), u, k, values, state, min(chunk_size, v.shape[1]))
    return o.to(v.dtype), state if output_final_state else None


def empty_state(v: Tensor) -> Tensor:
    """The state before the first token of v [B, T, D]: [B, 3, D] fp32 (fp64 for fp64)."""
    state = v.new_zeros(v.shape[0], 3, v.shape[2], dtype=torch.promote_types(v.dtype, torch.float32))
    state[:, 2] = NOTHING
    return state


class _WKV(torch.autograd.Function):
    """Both passes are decayed sums: the backward one runs from the end, and its weights are 1 over the denominators."""

    @staticmethod
    def forward(ctx, d: Tensor, u: Tensor, k: Tensor, v: Tensor, initial: Tensor, C: int) -> tuple[Tensor, Tensor]:
        T = k.shape[1]
        (a, b), p = _decayed_sums((v, v.new_ones(()).expand_as(v)), k, d, initial[:, :2].unbind(1), initial[:, 2], C)
        logit = u + k
        top = torch.maximum(p[:, :T], logit)
        past, now = (p[:, :T] - top).exp_(), logit.sub_(top).exp_()  # [B, T, D]
        weight = torch.addcmul(now, past, b[:, :T])
        wkv = past.mul_(a[:, :T]).addcmul_(now, v).div_(weight)
        log_total = weight.log_().add_(top)
        ctx.save_for_backward(d, u, k, v, a, b, p, wkv, log_total)
        ctx.chunk_size = C
        return wkv, torch.stack((a[:, T], b[:, T], p[:, T]), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        d, u, k, v, a, b, p, wkv, log_total = ctx.saved_tensors
        T = k.shape[1]
        # grad_A[t] = grad[t+1] / total[t+1] + exp(d) grad_A[t+1], and -grad_B likewise from grad * wkv
        (grad_a, minus_grad_b), s = _decayed_sums(
            (grad.flip(1), (grad * wkv).flip(1)), -log_total.flip(1), d,
            (grad_state[:, 0], -grad_state[:, 1]), -p[:, T], ctx.chunk_size,
        )  # [B, T+1, D] each: of the state behind each token, the last one first, and of the initial state
        grad_a, minus_grad_b, s = (x.flip(1) for x in (grad_a, minus_grad_b, s))
        a0, b0, p0 = a[:, 0], b[:, 0], p[:, 0]
        scale = (p0 + s[:, 0]).exp()  # [B, D]
        grad_a0, grad_b0 = scale * grad_a[:, 0], -scale * minus_grad_b[:, 0]
        grad_initial = torch.stack((grad_a0, grad_b0, grad_a0 * a0 + grad_b0 * b0), dim=1)

        grad_a, minus_grad_b, s = grad_a[:, 1:], minus_grad_b[:, 1:], s[:, 1:]  # [B, T, D]
        faded = (s + p[:, :T]).add_(d).exp_()  # of the state before the token in that behind it
        grad_d = (grad_a * a[:, :T]).addcmul_(minus_grad_b, b[:, :T], value=-1).mul_(faded).sum((0, 1))
        now = (u + k).sub_(log_total).exp_().mul_(grad)  # [B, T, D]
        later = (k + s).exp_()
        grad_u = now * (v - wkv)  # of u for each token
        grad_k = torch.addcmul(grad_u, later, (grad_a * v).sub_(minus_grad_b))
        return grad_d, grad_u.sum((0, 1)), grad_k, now.addcmul_(later, grad_a), grad_initial, None


def _decayed_sums(
    values: Sequence[Tensor], log_weight: Tensor, d: Tensor, sums: Sequence[Tensor], p: Tensor, C: int
) -> tuple[list[Tensor], Tensor]:
    """For every value x, S[t] = exp(d) S[t-1] + exp(log_weight[t]) x[t], written as exp(p[t]) times a sum.

    Args:
        values: each [B, T, D]. log_weight: [B, T, D]. d: [D].
        sums: the first sum for every value, each [B, D], to be multiplied by exp(p), p [B, D].

    Returns:
        the sums, each [B, T+1, D], and p [B, T+1, D]: before each token, and after the last one.
    """
    T = log_weight.shape[1]
    values, log_weight = [_to_chunks(x, C, 0.0) for x in values], _to_chunks(log_weight, C, NOTHING)  # [B, N, C, D]
    B, N, _, D = log_weight.shape
    results = [d.new_empty(B, N * C + 1, D) for _ in range(len(values) + 1)]  # the sums', and that for p
    *before, before_p = (x[:, :-1].unflatten(1, (N, C)) for x in results)  # [B, N, C, D]

    # Between chunks: what each adds, at its end.
    log_left = log_weight + d * torch.arange(C - 1, -1, -1, device=d.device).unsqueeze(-1)  # [B, N, C, D]
    chunk_p = log_left.amax(2)  # [B, N, D]
    left = log_left.sub_(chunk_p.unsqueeze(2)).exp_()
    chunk_sums = [(left * x).sum(2) for x in values]  # [B, N, D]
    for n in range(N + 1):
        for x, start in zip(results, (*sums, p), strict=True):
            x[:, n * C] = start
        if n < N:
            sums, p = _add(sums, p + C * d, [x[:, n] for x in chunk_sums], chunk_p[:, n])

    # Within chunks, all of them at once.
    for i in range(C - 1):
        torch.maximum(before_p[:, :, i] + d, log_weight[:, :, i], out=before_p[:, :, i + 1])
    left = (before_p[:, :, :-1] + d).sub_(before_p[:, :, 1:]).exp_()  # [B, N, C-1, D]
    added = (log_weight[:, :, :-1] - before_p[:, :, 1:]).exp_()
    for x, sums in zip(values, before, strict=True):
        torch.mul(added, x[:, :, :-1], out=sums[:, :, 1:])
        for i in range(C - 1):
            sums[:, :, i + 1].addcmul_(left[:, :, i], sums[:, :, i])
    *sums, p = (x[:, : T + 1] for x in results)
    return sums, p


def _add(sums: Sequence[Tensor], p: Tensor, others: Sequence[Tensor], other_p: Tensor) -> tuple[list[Tensor], Tensor]:
    """exp(p) * sums + exp(other_p) * others, again over the exponential of its largest log weight."""
    top = torch.maximum(p, other_p).detach()
    left, added = (p - top).exp(), (other_p - top).exp()
    return [torch.addcmul(left * x, added, y) for x, y in zip(sums, others, strict=True)], top


def _to_chunks(x: Tensor, C: int, filling: float) -> Tensor:
    """[B, T, D] to [B, N, C, D], with `filling` behind the last token."""
    missing = -x.shape[1] % C
    return (F.pad(x, (0, 0, 0, missing), value=filling) if missing else x).unflatten(1, (-1, C))


rwkv4 = dispatched("rwkv4", rwkv4_chunked)
