"""The recurrence between chunks, shared by gla and ssd: a linear scan over matrix-valued states.

    S[n+1] = decay[n] * S[n] + update[n]

One fused multiply-add a chunk, written straight into the result, and a backward pass that runs the same recurrence
from the end; autograd through a Python loop would keep and copy every intermediate state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay: Tensor, update: Tensor, initial: Tensor) -> Tensor:
        states = update.new_empty(update.shape[0] + 1, *update.shape[1:])  # [N+1, ...]
        states[0] = initial
        for n in range(update.shape[0]):
            torch.addcmul(update[n], decay[n], states[n], out=states[n + 1])
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        total = torch.empty_like(states)  # gradient of each state through every later one
        total[-1] = grad_states[-1]
        for n in range(decay.shape[0] - 1, -1, -1):
            torch.addcmul(grad_states[n], decay[n], total[n + 1], out=total[n])
        grad_update = total[1:]
        grad_decay = (grad_update * states[:-1]).sum_to_size(decay.shape)
        return grad_decay, grad_update, total[0]


def chunk_scan(decay: Tensor, update: Tensor, initial: Tensor) -> Tensor:
    """Run S[n+1] = decay[n] * S[n] + update[n] over the first dimension, from S[0] = initial.

    Args:
        decay: [N, ...], broadcastable to update.
        update: [N, ...].
        initial: [...], the shape of one update.

    Returns:
        [N+1, ...]: the state before each chunk, and after the last one. Differentiable once.
    """
    return _ChunkScan.apply(decay, update, initial)
