"""The settings that a MAD score is the mean of.

For each task mad-lab has a base setting and changes one parameter of it at a time (`configs/tasks/*.yml`); each setting
is trained with 3 learning rates and 2 weight decays, the best test accuracy of the 6 counts, and the MAD score of
a task is the mean over its settings (MAD paper, section 3; mad-lab's `analysis.py`). That makes 66 settings:
in-context recall 11, noisy 14, fuzzy 11, selective copying 13, compression 11, memorization 6.

Resona's appendix A.3 says that it follows "the benchmark settings" of the MAD paper, with a batch size of 128 and
learning rates from 1e-3 to 1e-4; it names no settings, no weight decay and no number of epochs. Section 4.2.1
speaks of 20,000 training and 1,000 test examples and a vocabulary of 8192 for both MQAR and MAD, which none of
MAD's settings has; the numbers of Table 1 fit MAD's settings (see `memorization.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lrm_recall.tasks.mad.task import TASKS, MADTask

LEARNING_RATES = (1e-4, 5e-4, 1e-3)
WEIGHT_DECAYS = (0.0, 0.1)

_FEWER_EXAMPLES = (6400, 3200, 1600, 800)
_RECALL = {"vocab_size": (32, 64, 128), "seq_len": (256, 512, 1024), "num_train_examples": _FEWER_EXAMPLES}
_CHANGES: dict[str, dict[str, tuple]] = {
    "compression": {"vocab_size": (32, 64, 128), "seq_len": (64, 128, 256), "num_train_examples": _FEWER_EXAMPLES},
    "in-context-recall": _RECALL,
    "noisy-in-context-recall": {**_RECALL, "vocab_size": (48, 80, 144), "frac_noise": (0.4, 0.6, 0.8)},
    "fuzzy-in-context-recall": _RECALL,
    "selective-copying": {"vocab_size": (32, 64, 128), "seq_len": (512, 1024), "num_train_examples": _FEWER_EXAMPLES,
                          "num_tokens_to_copy": (32, 64, 96)},
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
}


def benchmark(tasks: Iterable[str] = TASKS, **settings: Any) -> list[MADTask]:
    """All settings of the benchmark, task by task, each task's base setting first.

    Args:
        tasks: names of the tasks wanted.
        settings: parameters of all settings, such as num_test_examples=128; what the benchmark changes wins.

    Raises:
        ValueError: no such task, or a task has no such parameter.
    """
    found = []
    for name in tasks:
        base = MADTask(task=name, **settings)  # also refuses an unknown name
        changes = [{parameter: value} for parameter, values in _CHANGES[name].items() for value in values]
        found += [base, *(MADTask(**{"task": name, **settings, **change}) for change in changes)]
    return found
