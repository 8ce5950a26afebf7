"""In-context recall, with noise or without: after a key that came before stands the value that stood there.

A sequence is P = L / 2 - 1 pairs of a key and a value, each drawn uniformly, keys again and again, the value of
a key being the same within a sequence; then one more pair with a key that came before. A pair may be two noise
tokens instead. Test targets are the values of keys that came before, or with multi_query False only the last
one, before which a special token stands.

mad-lab fails where noise takes every pair (the one that it spares may be the last, which never takes noise
anyway); such a sequence is drawn anew here. It takes 63 noise pairs of 63 at the base setting.
"""

from __future__ import annotations

import numpy as np

from lrm_recall.tasks.mad.shift import shifted
from lrm_recall.tasks.mad.stream import Stream
from lrm_recall.tasks.mad.task import MADTask


def recall(task: MADTask, stream: Stream, num_examples: int, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [N, L or L - 1] int64."""
    tokens = np.empty((num_examples, task.input_length + 1), dtype=np.int64)
    asked = np.zeros(tokens.shape, dtype=bool)
    for row in range(num_examples):
        tokens[row], answers = _sequence(task, stream)
        asked[row, answers] = True
    return shifted(tokens, asked, training)


def _sequence(task: MADTask, stream: Stream) -> tuple[list[int], list[int]]:
    """A sequence's tokens, and the positions of its answers."""
    below, uniform, num_pairs = stream.below, stream.uniform, task.seq_len // 2
    num_keys, num_values, first_noise = task.num_keys, task.num_values, task.num_ordinary_tokens
    tokens: list[int] = []
    answers: list[int] = []
    value_of: dict[int, int] = {}
    while not value_of:
        tokens.clear()
        spared = below(num_pairs)
        for pair in range(num_pairs - 1):
            if task.frac_noise > 0 and pair != spared and uniform() < task.frac_noise:
                tokens += first_noise + below(task.noise_vocab_size), first_noise + below(task.noise_vocab_size)
                continue
            key = below(num_keys)
            if key in value_of:
                answers.append(len(tokens) + 1)
            else:
                value_of[key] = num_keys + below(num_values)
            tokens += key, value_of[key]
    query = stream.pick(list(value_of))
    if not task.multi_query:
        tokens.append(task.vocab_size - 1)
        answers.clear()
    tokens += query, value_of[query]
    return tokens, [*answers, len(tokens) - 1]
