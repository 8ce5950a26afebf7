"""Mamba2 with a wider state (StateX, section 4.2): where the new rows of B and C must not all be zero.

Mamba2 writes S += dt B^T x and answers C S: B is its key, C its query. A new channel n adds C[n] B[n] to every score, a
product of two numbers. Where one of them is zero the function is unchanged and the OTHER one's value is the gradient
that moves it; where both are zero, so are both gradients, and no step ever leaves that point. Section 5.4 of the paper
says only: "we initialize the new parameters with zeros".

B batch, T tokens, P channels and H heads of the input, N old and E N new channels of the state
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.model import RecurrentLM
from lrm_recall.statex.surgery import widen_state

STARTS = ("zero_B", "zero_C", "zero_both")
FACTOR = 4


class Widened(NamedTuple):
    """What one start of the new rows gives.

    Attributes:
        state: [E N, H P], the layer's state after a text, key channels in rows.
        function_change: largest difference of any logit, right after the surgery.
        gradient: norm of the loss's gradient on the new rows of B and of C.
        moved: how far a few steps of training have moved the new rows of B and of C.
    """

    state: Tensor
    function_change: float
    gradient: tuple[float, float]
    moved: tuple[float, float]


def new_mamba2(state_size: int = 8, seed: int = 0) -> RecurrentLM:
    """A Mamba2 model of one layer, N = state_size; torch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RecurrentLM(RecurrentLMConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, mixer="mamba2", mlp="none", initializer_range=0.2,
            mixer_args={"state_size": state_size, "head_dim": 16, "chunk_size": 16},
        )).eval()


def try_start(model: RecurrentLM, start: str, steps: int = 20, seed: int = 0) -> Widened:
    """Widen the model, and see what its new rows do on one batch of random text.

    Args:
        model: of `new_mamba2`; it is left as it is.
        start: the `new_rows` of `statex.widen_state`.
        steps: of AdamW without weight decay, so that only gradients move anything.
    """
    tokens = torch.randint(model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        wide = widen_state(model, [0], FACTOR, start="inherit", new_rows=start)
    with torch.no_grad():
        after = wide(tokens, use_cache=True)
        change = (after.logits - model(tokens, use_cache=False).logits).abs().max().item()
    state = after.past_key_values.layers[0]["state"][0].flatten(0, 1).T  # [B, H, P, E N] -> [E N, H P]

    weight = wide.model.layers[0].mixer.in_proj.weight
    before, gradient = [rows.clone() for rows in new_rows(wide, weight.detach())], None
    optimizer = torch.optim.AdamW(wide.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        scores = wide(tokens, use_cache=False).logits[:, :-1]  # [B, T - 1, vocabulary]
        F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradient = gradient or tuple(rows.norm().item() for rows in new_rows(wide, weight.grad))
        optimizer.step()
    moved = tuple((now - then).norm().item() for now, then in zip(new_rows(wide, weight.detach()), before,
                                                                  strict=True))
    return Widened(state, change, gradient, moved)


def new_rows(model: RecurrentLM, projection: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of B and of C that the surgery added to a tensor shaped like `in_proj.weight` (one group)."""
    mixer = model.model.layers[0].mixer
    begin, old = 2 * mixer.inner_size, mixer.d_state // FACTOR  # rows stand as [z | x | B | C | dt]
    B, C = projection[begin : begin + 2 * mixer.d_state].unflatten(0, (2, mixer.d_state))  # two of [E N, D]
    return B[old:], C[old:]
