"""Selective copying: after the copy token, say the tokens that came, in their order, without the blanks between.

A sequence of length L holds n tokens and L - 2n - 1 blanks among them, the copy token V - 1, and n blanks (V - 2)
at which the answers are due; the same holds in training. As in mad-lab, each blank goes before one of the tokens,
so the last token stands right before the copy token; and the blanks are placed off numpy's global state, which
its `train.py` seeds as the generator that draws the tokens.
"""

from __future__ import annotations

import numpy as np

from lrm_recall.tasks.mad.stream import Stream
from lrm_recall.tasks.mad.task import MADTask
from lrm_recall.tasks.mqar import IGNORE


def selective_copying(
    task: MADTask, stream: Stream, num_examples: int, training: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [N, L] int64; training and test examples are alike."""
    n = task.num_tokens_to_copy
    num_blanks = task.seq_len - 2 * n - 1
    to_copy = stream.generator.integers(task.num_ordinary_tokens, size=(num_examples, n))  # [N, n]
    before = stream.legacy.randint(0, n, size=(num_examples, num_blanks))  # [N, blanks]: the token that each precedes
    cell = before + n * np.arange(num_examples)[:, None]  # [N, blanks]
    blanks_before = np.bincount(cell.ravel(), minlength=n * num_examples).reshape(num_examples, n)  # [N, n]
    positions = np.arange(n) + blanks_before.cumsum(axis=1)  # [N, n]
    inputs = np.full((num_examples, task.seq_len), task.vocab_size - 2, dtype=np.int64)  # [N, L]
    np.put_along_axis(inputs, positions, to_copy, axis=1)
    inputs[:, -n - 1] = task.vocab_size - 1
    targets = np.full_like(inputs, IGNORE)  # [N, L]
    targets[:, -n:] = to_copy
    return inputs, targets
