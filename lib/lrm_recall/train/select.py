"""Which learning rate counts: the rule of every table and figure of the synthetic runs.

The rule. A cell is all runs that differ in nothing but learning rate and seed. Its learning rate is the one
with the best accuracy per position on the validation set, averaged over the seeds (a seed without a row,
because it diverged, counts as zero); of equals, the smaller. What is reported is the test accuracy of that
learning rate's runs, all seeds of it. The test set chooses nothing.
"""

from __future__ import annotations

import pandas as pd

_RATE = "config.learning_rate"
_SCORE = "metrics.valid_accuracy"
_NOT_OF_THE_CELL = (_RATE, "config.seed")


def select(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that count, by the rule above.

    Args:
        frame: rows of the store as `lrm_recall.results.frame` gives them: one column a field of the
            configuration (`config.mixer`, ...), `seed` and `metrics.valid_accuracy`; `profile` and `code`, if
            there, part cells too.

    Returns:
        those rows of `frame` that have their cell's learning rate, in their old order.

    Raises:
        ValueError: a column that the rule needs is missing.
    """
    for name in (_RATE, _SCORE, "seed"):
        if name not in frame:
            raise ValueError(f"the table has no column {name!r}; it must come from lrm_recall.results.frame")
    cell = [name for name in frame if name.startswith("config.") and name not in _NOT_OF_THE_CELL]
    cell += [name for name in ("profile", "code") if name in frame]
    groups = frame.groupby(cell, dropna=False, sort=False, group_keys=False)
    chosen = [rows.index[rows[_RATE] == _best_rate(rows)] for _, rows in groups]
    return frame.loc[sorted(label for labels in chosen for label in labels)]


def _best_rate(rows: pd.DataFrame) -> float:
    """The learning rate of one cell."""
    seeds = rows["seed"].nunique()
    scores = rows.groupby(_RATE)[_SCORE].sum() / seeds  # sorted by rate, so that idxmax takes the smaller of equals
    return scores.idxmax()
