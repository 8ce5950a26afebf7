"""Memorization: at the token after a key, say the key's value, by a map that is the same in every sequence.

The map pairs every key with a value of its own, training and test sequences alike. A test sequence is answerable
as far as the training set has shown the facts, 16 draws with replacement a sequence at the base length: with
mad-lab's 256 training sequences that is all but all of them up to a vocabulary of 1024, then 99% at 2048, 87% at
4096 and 64% at 8192. mad-lab scores all facts, and so do the targets here; `shown_in_training` tells them apart.
Over the benchmark's settings a model that knows all it was shown therefore has 0.92 (plain) and, guessing the
rest, 0.89 (macro) at mad-lab's seed, and 0.66 of whole sequences. Table 1 of Resona has 0.88 to 0.89 for most.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lrm_recall.tasks.mad.stream import Stream
from lrm_recall.tasks.mad.task import MADTask
from lrm_recall.tasks.mqar import IGNORE


def facts(task: MADTask, seed: int) -> dict[int, int]:
    """The value of each key, in the order in which keys are numbered for drawing."""
    # mad-lab's configuration forgets the noise tokens here: they become values, and keys shift
    num_tokens = task.vocab_size - 1 if task.as_released else task.num_ordinary_tokens
    rng = np.random.default_rng(seed if task.kv_map_seed is None else task.kv_map_seed)
    keys, values = np.split(np.arange(num_tokens), [num_tokens // 2])
    rng.shuffle(keys)
    rng.shuffle(values)
    return dict(zip(keys.tolist(), values.tolist(), strict=False))  # of an odd number, one value is left over


def memorization(task: MADTask, stream: Stream, num_examples: int, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [N, L] int64; training and test examples are alike."""
    below = stream.below
    value_of = facts(task, stream.seed)
    keys = list(value_of)
    num_pairs = task.seq_len // 2
    inputs = np.full((num_examples, 2 * num_pairs), task.vocab_size - 1, dtype=np.int64)  # [N, L], the insert token
    targets = np.full_like(inputs, IGNORE)  # [N, L]
    for row in range(num_examples):
        spared = below(num_pairs)
        for pair in range(num_pairs):
            if task.frac_noise > 0 and pair != spared and stream.uniform() < task.frac_noise:
                inputs[row, 2 * pair] = task.num_ordinary_tokens + below(task.noise_vocab_size)
                inputs[row, 2 * pair + 1] = task.num_ordinary_tokens + below(task.noise_vocab_size)
                continue
            key = stream.pick(keys)
            inputs[row, 2 * pair] = key
            targets[row, 2 * pair + 1] = value_of[key]
    return inputs, targets


def shown_in_training(train_targets: Tensor, test_targets: Tensor) -> Tensor:
    """Which test positions [N, L] bool ask for a value that some training target is: the rest can be guessed only.

    Their share among the scored positions is the highest plain accuracy that memorization leaves to a model.
    """
    return (test_targets != IGNORE) & torch.isin(test_targets, train_targets)
