"""Training and test set of a MAD task.

    N examples, L input length
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrm_recall.tasks.mad.compression import compression
from lrm_recall.tasks.mad.fuzzy_recall import fuzzy_recall
from lrm_recall.tasks.mad.memorization import memorization
from lrm_recall.tasks.mad.recall import recall
from lrm_recall.tasks.mad.selective_copying import selective_copying
from lrm_recall.tasks.mad.stream import Stream
from lrm_recall.tasks.mad.task import MADTask, check_seed

_GENERATORS = {
    "compression": compression,
    "in-context-recall": recall,
    "noisy-in-context-recall": recall,
    "fuzzy-in-context-recall": fuzzy_recall,
    "selective-copying": selective_copying,
    "memorization": memorization,
}
_MAX_REDRAWS = 100


class MADData(NamedTuple):
    """One set of examples: inputs [N, L] int64, and targets [N, L] int64, -100 where nothing is scored."""

    inputs: Tensor
    targets: Tensor


class MADSplits(NamedTuple):
    """Training and test set; no input of the one is an input of the other."""

    train: MADData
    test: MADData


def mad_data(task: MADTask, seed: int = 12345) -> MADSplits:
    """Make the training and the test set of a task.

    The test set goes on where the training set stopped drawing, as in mad-lab. A test input that is also a
    training input is drawn anew (mad-lab prints a warning); at no setting of the benchmark has one been seen.

    The targets of recall's training sets are all next tokens (what mad-lab trains on); of the other tasks, and
    of every test set, they are the answers alone.

    Args:
        task: the task and its parameters.
        seed: 0 ... 2^32 - 1; mad-lab's default is 12345.

    Raises:
        ValueError: a bad seed, or so few different sequences exist that no unseen ones can be found to test on.
    """
    check_seed(seed)
    generate = _GENERATORS[task.task]
    stream = Stream(seed)
    train_inputs, train_targets = generate(task, stream, task.num_train_examples, True)
    test_inputs, test_targets = generate(task, stream, task.num_test_examples, False)
    seen = {row.tobytes() for row in train_inputs}
    for _ in range(_MAX_REDRAWS):
        shared = [i for i, row in enumerate(test_inputs) if row.tobytes() in seen]
        if not shared:
            break
        test_inputs[shared], test_targets[shared] = generate(task, stream, len(shared), False)
    else:
        raise ValueError(f"{task.task}: after {_MAX_REDRAWS} draws {len(shared)} of {task.num_test_examples} test "
                         f"inputs are still training inputs; vocab_size {task.vocab_size} and seq_len {task.seq_len} "
                         f"leave too few others beside {task.num_train_examples} training examples")
    return MADSplits(MADData(torch.from_numpy(train_inputs), torch.from_numpy(train_targets)),
                     MADData(torch.from_numpy(test_inputs), torch.from_numpy(test_targets)))
