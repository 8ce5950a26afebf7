"""The delta rule: a state that each token corrects in the direction of its key.

    S[t] = (I - beta[t] k[t] k[t]^T) S[t-1] + beta[t] k[t] v[t]^T          o[t] = scale * S[t]^T q[t]

(DeltaNet, arXiv 2406.06484, section 2.2, with the state transposed.) It is the gated delta rule without decay, and
every form here is that one's; gated_delta_rule.py tells the maths.

B batch, T tokens, H heads, K key channels per head, V value channels per head
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrm_recall.ops.dispatch import dispatched
from lrm_recall.ops.gated_delta_rule import (
    gated_delta_rule_chunked,
    gated_delta_rule_recurrent,
    gated_delta_rule_step,
)


def delta_rule_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in fp32: the reference for every other form.

    Args and returns as `delta_rule_chunked`.
    """
    no_decay = torch.zeros_like(beta)
    return gated_delta_rule_recurrent(q, k, v, no_decay, beta, scale=scale, initial_state=initial_state)


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token, for decoding.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        beta: [B, H].
        state: [B, H, K, V] fp32.
        scale: K**-0.5 by default.

    Returns:
        o [B, H, V] in v's dtype, and the new state.
    """
    return gated_delta_rule_step(q, k, v, torch.zeros_like(beta), beta, state, scale=scale)


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    l2_norm: bool = False,
    chunk_size: int = 64,
    output_final_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same recurrence as matrix products over chunks of tokens (DeltaNet, section 3).

    Args:
        q, k: [B, T, H, K], any floating dtype, any strides; the keys no longer than 1, or `l2_norm`.
        v: [B, T, H, V].
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
    return gated_delta_rule_chunked(
        q,
        k,
        v,
        torch.zeros_like(beta),
        beta,
        scale=scale,
        initial_state=initial_state,
        l2_norm=l2_norm,
        chunk_size=chunk_size,
        output_final_state=output_final_state,
    )


delta_rule = dispatched("delta_rule", delta_rule_chunked)
