"""Compression: the sequence must be decoded from what a model holds at its last position.

Tokens are uniform over the ordinary vocabulary, the last one is the compression token c = V - 1. The target at
each position is the token there, so only a model that decodes the last position learns anything
(`MADTask.decodes_last_position`). As in mad-lab, the compression token is itself a target, always the same: it
adds one class that any model has right to the macro average (1 of 16 at the base setting) and one position in
32 to the plain one.
"""

from __future__ import annotations

import numpy as np

from lrm_recall.tasks.mad.stream import Stream
from lrm_recall.tasks.mad.task import MADTask
from lrm_recall.tasks.mqar import IGNORE


def compression(task: MADTask, stream: Stream, num_examples: int, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [N, L] int64; training and test examples are alike."""
    num_tokens = task.num_ordinary_tokens
    inputs = np.full((num_examples, task.seq_len), task.vocab_size - 1, dtype=np.int64)  # [N, L]
    noise = np.zeros(inputs.shape, dtype=bool)  # [N, L]
    for row in range(num_examples):
        inputs[row, :-1] = stream.generator.integers(num_tokens, size=task.seq_len - 1)
        if task.frac_noise > 0:
            for i in range(task.seq_len - 1):
                if stream.uniform() < task.frac_noise:
                    inputs[row, i] = num_tokens + stream.below(task.noise_vocab_size)
                    noise[row, i] = True
    scored = np.ones_like(noise) if task.as_released else ~noise  # [N, L]
    return inputs, np.where(scored, inputs, IGNORE)
