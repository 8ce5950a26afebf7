"""The gated delta rule: a state that decays, and that each token corrects in the direction of its key.

    S[t] = a[t] (I - beta[t] k[t] k[t]^T) S[t-1] + beta[t] k[t] v[t]^T          o[t] = scale * S[t]^T q[t]

with a[t] = exp(log_decay[t]) (Gated DeltaNet, arXiv 2412.06464, equation 10, with the state transposed). In steps:

    u[t] = beta[t] (v[t] - a[t] S[t-1]^T k[t])          S[t] = a[t] S[t-1] + k[t] u[t]^T

`gated_delta_rule_recurrent` is that loop in fp32, the oracle; `gated_delta_rule_chunked` is the form to train with;
`gated_delta_rule_step` decodes one token.

B batch, T tokens, H heads, K key channels per head, V value channels per head
C tokens in a chunk, N chunks
S state [K, V]; u correction of a token [V], U those of a chunk [C, V]
G cumulative log decay within a chunk, so G[i] - G[j] spans tokens j+1..i

In a chunk, a correction reads the state before the chunk and the chunk's earlier corrections. That is a unit lower
triangular system (section 3.3; DeltaNet, arXiv 2406.06484, section 3, calls its solution the UT transform):

    (I + A) U = beta V - R S        R[i] = beta[i] exp(G[i]) k[i]
                                    A[i, j] = beta[i] exp(G[i] - G[j]) (k[i] . k[j]) for j < i

Every factor stays in range, whatever the decay: each exponent is a sum of log decays, at most 0, over a span of
tokens, added up over that span alone (a difference of two long sums would lose its digits after one huge decay). And
with keys no longer than 1 and beta in [0, 2], no I - beta k k^T makes anything longer, so that no entry of
(I + A)^-1 exceeds 2. The powers of A do grow, so the inverse is not taken as a series of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrm_recall.ops.chunks import from_chunks, to_chunks
from lrm_recall.ops.decay import decay_after
from lrm_recall.ops.dispatch import dispatched
from lrm_recall.ops.norm import unit_length


def gated_delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32: the reference for every other form.

    Args and returns as `gated_delta_rule_chunked`.
    """
    (B, T, H, K), out_dtype = q.shape, v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    scale = K**-0.5 if scale is None else scale
    q, k, v = (x.to(dtype).unsqueeze(-2) for x in (q, k, v))  # [B, T, H, 1, K or V]
    log_decay, beta = (x.to(dtype)[..., None, None] for x in (log_decay, beta))  # [B, T, H, 1, 1]
    q, decay = scale * q, log_decay.exp()
    state = v.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        state = decay[:, t] * state  # [B, H, K, V]
        correction = beta[:, t] * (v[:, t] - k[:, t] @ state)  # [B, H, 1, V]
        state = state + k[:, t].mT * correction  # [B, H, K, V]
        outputs.append((q[:, t] @ state).squeeze(-2))  # [B, H, V]
    return torch.stack(outputs, dim=1).to(out_dtype), state  # [B, T, H, V]


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token, for decoding.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        log_decay, beta: [B, H].
        state: [B, H, K, V] fp32.
        scale: K**-0.5 by default.

    Returns:
        o [B, H, V] in v's dtype, and the new state.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, out_dtype = state.dtype, v.dtype
    q, k, v = (x.to(dtype).unsqueeze(-2) for x in (q, k, v))  # [B, H, 1, K or V]
    log_decay, beta = (x.to(dtype)[..., None, None] for x in (log_decay, beta))  # [B, H, 1, 1]
    state = log_decay.exp() * state  # [B, H, K, V]
    state = torch.addcmul(state, k.mT, beta * (v - k @ state))
    return (scale * q @ state).squeeze(-2).to(out_dtype), state  # [B, H, V]


def gated_delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    l2_norm: bool = False,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same recurrence as matrix products over chunks of tokens (Gated DeltaNet, section 3.3).

    Args:
        q, k: [B, T, H, K], any floating dtype, any strides; the keys no longer than 1, or `l2_norm`.
        v: [B, T, H, V].
        log_decay: [B, T, H], finite, at most 0, of any size.
        beta: [B, T, H], from 0 to 2.
        scale: of the outputs; K**-0.5 by default.
        l2_norm: bring queries and keys to unit length first.
        initial_state: [B, H, K, V]; zeros by default.
        chunk_size: most tokens in a chunk.
        output_final_state: whether the state is returned.

    Returns:
        o [B, T, H, V] in v's dtype, and the state after the last token, [B, H, K, V] fp32 (fp64 for fp64 inputs),
        or None if it was not asked for. Differentiable once in every tensor argument.

    Raises:
        ValueError: chunk_size is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    (B, T, H, K), V, out_dtype = q.shape, v.shape[-1], v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    scale = K**-0.5 if scale is None else scale
    if l2_norm:
        q, k = unit_length(q), unit_length(k)
    if initial_state is None:
        initial_state = v.new_zeros(B, H, K, V, dtype=dtype)
    elif T == 1:
        q, k, v, log_decay, beta = (x[:, 0] for x in (q, k, v, log_decay, beta))  # [B, H, ...]
        o, state = gated_delta_rule_step(q, k, v, log_decay, beta, initial_state.to(dtype), scale=scale)
        return o.unsqueeze(1), state if output_final_state else None  # [B, 1, H, V]

    C = min(chunk_size, T)
    N = -(-T // C)
    # The end of the last chunk is filled with beta = 0 and no decay, which leaves the state as it is.
    q, k, v, log_decay, beta = (
        to_chunks(x, C, dtype).flatten(1, 2) for x in (q, k, v, log_decay.unsqueeze(-1), beta.unsqueeze(-1))
    )  # [N, B*H, C, K or V or 1]
    with torch.autocast(q.device.type, enabled=False):  # it would write products in bfloat16 into float32 tensors
        spans = log_decay.expand(-1, -1, -1, C).tril(-1).cumsum(-2).exp().tril()  # [N, B*H, C, C]: exp(G[i] - G[j])
        before = log_decay.cumsum(-2).exp()  # [N, B*H, C, 1]: decay from the chunk's start through the token
        corrections, states, final = _Corrections.apply(
            (k @ k.mT) * spans * beta,
            v * beta,
            k * (before * beta),
            k * decay_after(log_decay).exp(),
            before[..., -1:, :],
            initial_state.to(dtype).flatten(0, 1),
        )  # [N, B*H, C, V], [N, B*H, K, V], [B*H, K, V]
        scores = (q @ k.mT) * spans  # [N, B*H, C, C]
        o = (scores.flatten(0, 1) @ corrections.flatten(0, 1)).baddbmm_(
            (q * before).flatten(0, 1), states.flatten(0, 1), beta=scale, alpha=scale
        )  # [N*B*H, C, V]
        o = from_chunks(o.view(N, B, H, C, V), T).to(out_dtype)  # [B, T, H, V]
        return o, final.view(B, H, K, V) if output_final_state else None


class _Corrections(torch.autograd.Function):
    """The corrections of every token and the state before every chunk, from chunk to chunk.

        (I + A[n]) U[n] = values[n] - reads[n] S[n]          S[n+1] = decay[n] S[n] + writes[n]^T U[n]

    The backward pass runs the recurrence from the end. As U solves a linear system, the gradient of A is the outer
    product of U with what reached the right-hand side, and the inverse needs none of its own.
    """

    @staticmethod
    def forward(
        ctx, system: Tensor, values: Tensor, reads: Tensor, writes: Tensor, decay: Tensor, initial: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the recurrence.

        Args:
            system: [N, M, C, C], A below the diagonal; what stands on it and above is not read. M = B*H.
            values: [N, M, C, V]. reads, writes: [N, M, C, K]. decay: [N, M, 1, 1].
            initial: [M, K, V].

        Returns:
            corrections [N, M, C, V], the state before each chunk [N, M, K, V], the state after the last [M, K, V].
        """
        N, C = system.shape[0], system.shape[-1]
        identity = torch.eye(C, dtype=system.dtype, device=system.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
        corrections = torch.empty_like(values)
        states = initial.new_empty(N + 1, *initial.shape)  # [N+1, M, K, V]
        states[0] = initial
        for n in range(N):
            torch.bmm(inverse[n], torch.baddbmm(values[n], reads[n], states[n], alpha=-1), out=corrections[n])
            torch.mul(states[n], decay[n], out=states[n + 1]).baddbmm_(writes[n].mT, corrections[n])
        ctx.save_for_backward(inverse, reads, writes, decay, states, corrections)
        return corrections, states[:-1], states[-1].clone()  # a view would keep every state alive in a cache

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_corrections: Tensor, grad_states: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, reads, writes, decay, states, corrections = ctx.saved_tensors
        states = states[:-1]
        grad_values = torch.empty_like(corrections)
        later = torch.empty_like(states)  # gradient of the state after each chunk, through all that follows
        for n in range(len(states) - 1, -1, -1):
            later[n] = grad
            torch.bmm(inverse[n].mT, torch.baddbmm(grad_corrections[n], writes[n], grad), out=grad_values[n])
            grad = torch.addcmul(grad_states[n], decay[n], grad).baddbmm_(reads[n].mT, grad_values[n], alpha=-1)
        grad_decay = None
        if ctx.needs_input_grad[4]:
            grad_decay = later.flatten(2).unsqueeze(-2) @ states.flatten(2).unsqueeze(-1)  # [N, M, 1, 1]
        grad_system = (grad_values @ corrections.mT).neg_().tril_(-1)
        return grad_system, grad_values, (grad_values @ states.mT).neg_(), corrections @ later.mT, grad_decay, grad


gated_delta_rule = dispatched("gated_delta_rule", gated_delta_rule_chunked)
