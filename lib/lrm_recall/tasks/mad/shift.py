"""From whole sequences to next-token examples, for the recall tasks."""

from __future__ import annotations

import numpy as np

from lrm_recall.tasks.mqar import IGNORE


def shifted(tokens: np.ndarray, asked: np.ndarray, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [N, T - 1] of sequences [N, T].

    A model of the language of these sequences is what mad-lab trains: every next token is a training target,
    also where it cannot be known. Only test targets are the answers alone.

    Args:
        tokens: [N, T] int64.
        asked: [N, T] bool, the tokens that answer a query.
        training: whether every next token is a target.
    """
    following = tokens[:, 1:]  # [N, T - 1]
    targets = following.copy() if training else np.where(asked[:, 1:], following, IGNORE)  # [N, T - 1]
    return tokens[:, :-1].copy(), targets
