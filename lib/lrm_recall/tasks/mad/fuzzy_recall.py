"""Fuzzy in-context recall: in-context recall whose keys and values are motifs of one or more tokens.

A motif is an ordered choice of different tokens. Sizes are drawn uniformly from 1 ... the largest, except that
the keys of a test sequence all have the largest. One pair, the probe, is put in at a random place and asked for
at the end; sequences vary in length and are padded on the left.

The probe's place may lie beyond the last one that a pair starts at. Then nothing in the sequence answers the
query at its end, unless the same key was drawn by chance (2 to 3% of test sequences at length 128; see
`MADTask.as_released`): it is not scored here.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np

from lrm_recall.tasks.mad.shift import shifted
from lrm_recall.tasks.mad.stream import Stream
from lrm_recall.tasks.mad.task import MADTask


def fuzzy_recall(task: MADTask, stream: Stream, num_examples: int, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [N, L] int64."""
    num_keys, num_tokens = task.num_keys, task.num_ordinary_tokens
    smallest_key = 1 if training else task.k_motif_size
    keys = _Motifs(range(num_keys), range(smallest_key, task.k_motif_size + 1), stream)
    values = _Motifs(range(num_keys, num_tokens), range(1, task.v_motif_size + 1), stream)
    padding = task.vocab_size - 1 - (not task.multi_query)
    tokens = np.full((num_examples, task.seq_len + 1), padding, dtype=np.int64)  # [N, L + 1]
    asked = np.zeros(tokens.shape, dtype=bool)
    for row in range(num_examples):
        if task.generator == "exact":
            keys.shuffle()
            values.shuffle()
        sequence, answers = _sequence(task, keys, values, stream)
        start = task.seq_len + 1 - len(sequence)
        tokens[row, start:] = sequence
        asked[row, [start + i for i in answers]] = True
    return shifted(tokens, asked, training)


def _sequence(task: MADTask, keys: _Motifs, values: _Motifs, stream: Stream) -> tuple[list[int], list[int]]:
    """A sequence's tokens without padding, and the positions of its answers."""
    key_size, value_size = stream.pick(keys.sizes), stream.pick(values.sizes)
    query, answer = keys.draw(key_size), values.draw(value_size)
    probe_size = key_size + value_size
    full = task.seq_len - probe_size - task.k_motif_size - task.v_motif_size
    place = stream.below(task.seq_len - 2 * probe_size)
    tokens: list[int] = []
    answers: list[int] = []
    value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
    while len(tokens) < full:
        key_size, value_size = stream.pick(keys.sizes), stream.pick(values.sizes)
        if len(tokens) >= place and query not in value_of:
            key = query
        elif task.frac_noise > 0 and stream.uniform() < task.frac_noise:
            tokens += [task.num_ordinary_tokens + stream.below(task.noise_vocab_size)
                       for _ in range(key_size + value_size)]
            continue
        else:
            key = keys.draw(key_size)
        tokens += key
        if key in value_of:
            answers += range(len(tokens), len(tokens) + len(value_of[key]))
        else:
            value_of[key] = answer if key == query else values.draw(value_size)
        tokens += value_of[key]
    if not task.multi_query:
        tokens.append(task.vocab_size - 1)
        answers.clear()
    tokens += query
    if query in value_of or task.as_released:
        answers += range(len(tokens), len(tokens) + len(answer))
    tokens += answer
    return tokens, answers


class _Motifs:
    """All motifs over some tokens, a table a size, each with an order to draw from."""

    def __init__(self, tokens: range, sizes: range, stream: Stream):
        self.sizes = sizes
        self._stream = stream
        self._tables = {size: list(permutations(tokens, size)) for size in sizes}
        self._orders = {size: np.arange(len(table)) for size, table in self._tables.items()}

    def shuffle(self) -> None:
        """Give each table a new order: numpy takes the same words to shuffle an array and a list of its length."""
        for size, table in self._tables.items():
            self._orders[size] = np.arange(len(table))
            self._stream.generator.shuffle(self._orders[size])

    def draw(self, size: int) -> tuple[int, ...]:
        return self._tables[size][self._stream.pick(self._orders[size])]
