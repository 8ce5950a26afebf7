"""The recurrence between chunks, shared by gla and ssd: a linear scan over matrix-valued states.

    S[n+1] = decay[n] * S[n] + writes[n]^T values[n]

One matrix product a chunk, accumulated straight into the next state, and a backward pass that runs the recurrence
from the end; autograd through a Python loop would keep and copy every intermediate state.

N chunks, L tokens in a chunk, K and V the two sides of a state
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay: Tensor, writes: Tensor, values: Tensor, initial: Tensor) -> Tensor:
        N, K, V = decay.shape[0], *initial.shape[-2:]
        states = initial.new_empty(N + 1, *initial.shape)  # [N+1, ..., K, V]
        states[0] = initial
        decayed = torch.empty_like(states[0])
        for n in range(N):
            torch.mul(states[n], decay[n], out=decayed)
            keys, rows = writes[n].reshape(-1, *writes.shape[-2:]), values[n].reshape(-1, *values.shape[-2:])
            torch.baddbmm(decayed.view(-1, K, V), keys.mT, rows, out=states[n + 1].view(-1, K, V))
        ctx.save_for_backward(decay, writes, values, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decay, writes, values, states = ctx.saved_tensors
        total = torch.empty_like(states)  # gradient of each state through every later one
        total[-1] = grad_states[-1]
        for n in range(decay.shape[0] - 1, -1, -1):
            torch.addcmul(grad_states[n], decay[n], total[n + 1], out=total[n])
        later = total[1:]
        grad_decay = (later * states[:-1]).sum_to_size(decay.shape)
        return grad_decay, values @ later.mT, writes @ later, total[0]


def chunk_scan(decay: Tensor, writes: Tensor, values: Tensor, initial: Tensor) -> Tensor:
    """Run S[n+1] = decay[n] * S[n] + writes[n]^T values[n] over the first dimension, from S[0] = initial.

    Args:
        decay: [N, ...], broadcastable to states, [N, ..., K, V].
        writes: [N, ..., L, K]. values: [N, ..., L, V].
        initial: [..., K, V].

    Returns:
        [N+1, ..., K, V]: the state before each chunk, and after the last one. Differentiable once.
    """
    return _ChunkScan.apply(decay, writes, values, initial)
