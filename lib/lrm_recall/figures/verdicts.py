"""When a number of a paper counts as reproduced. Every verdict of every table is given here.

Four words, for a cell of Table 11 (MQAR):

reproduced      at the paper's own scale, our mean is within the tolerance of the printed value: 0.1 for a
                base model, 0.01 for one with Resona (the paper's claim there is exact recall, 1.000).
trend only      not that, but the paper's statement about the cell holds:
                base model   it is at the paper's level: solved (0.9 or more), partial, or guessing (no better
                             than naming one of the sequence's own values, 1 / pairs); or within 0.1 of it
                Resona       it recalls (0.99 or more), and its difference from our own base model, trained
                             with the same budget, has the paper's direction: better by more than 0.01 where
                             the paper's is; where the paper's base is within 0.01 of Resona, no worse by more
not reproduced  we ran it and neither holds.
not run         no row, or a row with Resona without the base row that its difference needs; or a cell at the
                paper's scale of which learning rates are still to be tried, and whose verdict another could change
                (`settled`).

For a cost in Tables 5 to 7 (milliseconds, GB), where less is better:

reproduced      at the paper's shape and on a GPU of its class, ours is at most the printed value plus a tenth.
trend only      not that, but what Resona adds, as a ratio to our own base model, is at most the printed ratio plus
                a tenth. (A base model at another scale has no trend to show: it is not run.)
not reproduced  we ran it and neither holds.

A toy-scale value is never "reproduced", however close it comes: less training can also make a base model look
bad. What counts as the paper's scale is said by `paper_scale_gaps`, field by field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

REPRODUCED, TREND_ONLY, NOT_REPRODUCED, NOT_RUN = "reproduced", "trend only", "not reproduced", "not run"
VERDICTS = (REPRODUCED, TREND_ONLY, NOT_REPRODUCED, NOT_RUN)

BASE_TOLERANCE = 0.1
RESONA_TOLERANCE = 0.01
SOLVED = 0.9  # a base model that the paper would not need Resona for
COST_TOLERANCE = 1.1
RECALLED = 0.99  # "perfect": also where training stops early

# Resona, section 4.2.1 and appendix A.3. 20k/1k examples are what 4.2.1 says; A.3 takes the learning rates of Arora et
# al., whose Figure 2 has 100k/3k examples. Epochs and learning rates here are those of that figure.
PAPER_LAYERS, PAPER_VOCABULARY = 4, 8192
PAPER_TRAIN, PAPER_TEST, PAPER_EPOCHS = 20_000, 1_000, 64
ZOOLOGY_TRAIN = 100_000
PAPER_LEARNING_RATES = tuple(np.logspace(-4, -2, 4).tolist())
PAPER_CHUNK_SIZE, PAPER_TOP_K = 2, 1
PAPER_POSITIONS_A_PAIR = 16  # 64 with 4 pairs ... 512 with 32
LACKS_RATES = f"{len(PAPER_LEARNING_RATES)} learning rates, 1e-4 to 1e-2"  # a gap that more runs of the sweep close


def paper_scale_gaps(cell: Mapping[str, Any]) -> list[str]:
    """What keeps a cell of `mqar_cells` from being at the paper's scale; empty when it is.

    Number of layers, vocabulary and pairs must be the paper's; examples and epochs at least as many (training
    may stop early at its target); the learning rates tried must include the four of the sweep, unless the model
    recalls at one of them, or is a base model (with the printed value as `paper`) whose verdict is `settled`; Resona
    has the paper's chunks and k.
    """
    with_resona = cell["variant"] != "base"
    tried = cell["learning_rates"]
    wanted = {
        f"{PAPER_LAYERS} layers": cell["num_layers"] == PAPER_LAYERS,
        f"vocabulary {PAPER_VOCABULARY}": cell["vocab_size"] == PAPER_VOCABULARY,
        "length / 16 pairs": cell["length"] == cell["pairs"] * PAPER_POSITIONS_A_PAIR,
        f"{PAPER_TRAIN:,} training examples": cell["num_train"] >= PAPER_TRAIN,
        f"{PAPER_TEST:,} test examples": cell["num_test"] >= PAPER_TEST,
        f"{PAPER_EPOCHS} epochs": cell["max_epochs"] >= PAPER_EPOCHS,
        LACKS_RATES: cell["accuracy"] >= RECALLED or not with_resona and settled(
            cell["accuracy"], cell.get("paper", math.nan), pairs=cell["pairs"]) or all(
            any(math.isclose(rate, other, rel_tol=0.02) for other in tried) for rate in PAPER_LEARNING_RATES),
        f"chunk_size {PAPER_CHUNK_SIZE}": not with_resona or cell["chunk_size"] == PAPER_CHUNK_SIZE,
        f"top_k {PAPER_TOP_K}": not with_resona or cell["top_k"] == PAPER_TOP_K,
    }
    return [gap for gap, met in wanted.items() if not met]


def base_verdict(ours: float | None, paper: float, *, pairs: int, at_paper_scale: bool) -> str:
    """Verdict on a base model's cell; `ours` is None where nothing ran."""
    if ours is None:
        return NOT_RUN
    close = _within(ours - paper, BASE_TOLERANCE)
    if close and at_paper_scale:
        return REPRODUCED
    return TREND_ONLY if close or level(ours, pairs) == level(paper, pairs) else NOT_REPRODUCED


def settled(ours: float, paper: float, *, pairs: int) -> bool:
    """Whether a base model's verdict is the same for every accuracy from `ours` to 1: the best of more learning rates
    is no worse than that of fewer, but for what validation and test differ by, so trying them could not change it."""
    if not ours >= paper - BASE_TOLERANCE:  # on its way up it would meet the paper's value; or there is none
        return False
    ends = {base_verdict(value, paper, pairs=pairs, at_paper_scale=True) for value in (ours, 1.0)}
    return len(ends) == 1


def resona_verdict(ours: float | None, paper: float, *, our_base: float | None, paper_base: float,
                   at_paper_scale: bool) -> str:
    """Verdict on a cell with Resona; the base values are those of the same model, length and dimension."""
    if ours is None:
        return NOT_RUN
    if at_paper_scale and _within(ours - paper, RESONA_TOLERANCE):
        return REPRODUCED
    if our_base is None:
        return NOT_RUN
    same_direction = _direction(ours - our_base) >= _direction(paper - paper_base)
    return TREND_ONLY if ours >= RECALLED and same_direction else NOT_REPRODUCED


def cost_verdict(
    ours: float | None, paper: float, *, our_ratio: float | None, paper_ratio: float | None, at_paper_scale: bool
) -> str:
    """Verdict on a cost; the ratios are those of Resona to the same model alone, None for a base model."""
    if ours is None:
        return NOT_RUN
    if at_paper_scale and ours <= COST_TOLERANCE * paper:
        return REPRODUCED
    if our_ratio is not None and paper_ratio is not None and our_ratio <= COST_TOLERANCE * paper_ratio:
        return TREND_ONLY
    return NOT_REPRODUCED if at_paper_scale or our_ratio is not None else NOT_RUN


def level(accuracy: float, pairs: int) -> str:
    """"solved", "partial" or "guessing", for an accuracy with that many pairs to confuse."""
    if accuracy >= SOLVED:
        return "solved"
    return "partial" if accuracy > 1 / pairs else "guessing"


def _direction(difference: float) -> int:
    """-1, 0 or 1; differences within the tolerance are none."""
    return 0 if _within(difference, RESONA_TOLERANCE) else int(math.copysign(1, difference))


def _within(difference: float, tolerance: float) -> bool:
    """|difference| <= tolerance in decimals: 1.000 - 0.990 is within 0.01, whatever binary makes of it."""
    return abs(difference) <= tolerance + 1e-9
