"""MAD's accuracies against a direct count, and against numbers of torchmetrics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrm_recall.tasks.mad import accuracy
from lrm_recall.tasks.mqar import IGNORE


def counted(predictions: list[list[int]], targets: list[list[int]], vocab_size: int, batch_size: int):
    """All three by hand, one class, position and example at a time."""
    macro = 0.0
    for start in range(0, len(targets), batch_size):
        batch = range(start, min(start + batch_size, len(targets)))
        pairs = [(p, t) for i in batch for p, t in zip(predictions[i], targets[i], strict=True) if t != IGNORE]
        shares = []
        for token in range(vocab_size):
            asked = [p for p, t in pairs if t == token]
            if asked:
                shares.append(asked.count(token) / len(asked))
            elif any(p == token for p, _ in pairs):
                shares.append(0.0)
        macro += len(batch) * (sum(shares) / len(shares) if shares else 0.0)
    examples = [[p == t for p, t in zip(*row, strict=True) if t != IGNORE]
                for row in zip(predictions, targets, strict=True)]
    examples = [right for right in examples if right]
    positions = [right for example in examples for right in example]
    return macro / len(targets), sum(positions) / len(positions), sum(map(all, examples)) / len(examples)


@st.composite
def answers(draw):
    rows, length, vocab_size = draw(st.integers(1, 8)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    token = st.integers(0, vocab_size - 1)

    def table(entry):
        return draw(st.lists(st.lists(entry, min_size=length, max_size=length), min_size=rows, max_size=rows))

    targets = table(token | st.just(IGNORE))
    targets[-1][-1] = draw(token)
    return table(token), targets, vocab_size, draw(st.integers(1, rows + 1))


@settings(max_examples=200, deadline=None)
@given(answers())
def test_all_three_against_a_direct_count(case):
    predictions, targets, vocab_size, batch_size = case
    got = accuracy(torch.tensor(predictions), torch.tensor(targets), vocab_size, batch_size=batch_size)
    assert got == pytest.approx(counted(predictions, targets, vocab_size, batch_size))
    whole = accuracy(torch.tensor(predictions), torch.tensor(targets), vocab_size, batch_size=None)
    assert whole.macro == pytest.approx(counted(predictions, targets, vocab_size, len(targets))[0])


def test_macro_and_plain_differ_and_each_says_what_it_counts():
    targets = torch.tensor([[1, 1, 1, IGNORE], [1, 2, IGNORE, IGNORE]])
    predictions = torch.tensor([[1, 1, 1, 0], [1, 3, 0, 0]])
    got = accuracy(predictions, targets, 5)
    assert got.macro == pytest.approx((1 + 0 + 0) / 3)  # classes 1 and 2 are asked for, 3 was said
    assert got.position == pytest.approx(4 / 5)
    assert got.sequence == pytest.approx(1 / 2)
    assert accuracy(predictions, targets, 5, batch_size=1).macro == pytest.approx((1 + (1 + 0 + 0) / 3) / 2)


def test_numbers_of_torchmetrics():
    """MulticlassAccuracy(num_classes=7, ignore_index=-100) of torchmetrics 1.9.0, in batches of 4 of 10 and at once."""
    i = torch.arange(10 * 6).reshape(10, 6)
    targets = torch.where(i % 4 == 0, IGNORE, i * i % 7)
    predictions = torch.where(i % 5 == 0, (i + 3) % 7, i * i % 7)
    assert accuracy(predictions, targets, 7, batch_size=4).macro == pytest.approx(0.608190, abs=1e-6)
    assert accuracy(predictions, targets, 7, batch_size=None).macro == pytest.approx(0.459707, abs=1e-6)


def test_logits_are_scored_by_their_largest():
    logits = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(1))
    assert accuracy(logits, targets, 6) == accuracy(logits.argmax(-1), targets, 6)


def test_what_stands_at_unscored_positions_does_not_matter():
    targets = torch.tensor([[IGNORE, 1, 0]])
    assert accuracy(torch.tensor([[999, 1, 0]]), targets, 2) == (1.0, 1.0, 1.0)


def test_what_cannot_be_scored():
    targets = torch.tensor([[0, 1], [1, IGNORE]])
    with pytest.raises(ValueError, match=r"targets \[N, L\], got \[2, 1\] and \[2, 2\]"):
        accuracy(targets[:, :1], targets, 2)
    with pytest.raises(ValueError, match="nothing is scored: all 4 targets are -100"):
        accuracy(targets, torch.full_like(targets, IGNORE), 2)
    with pytest.raises(ValueError, match="targets must be tokens below vocab_size"):
        accuracy(targets.clamp(max=0).clamp(min=0), targets, 1)
    with pytest.raises(ValueError, match=r"predictions must be tokens below vocab_size \(2\), got -1 ... 1"):
        accuracy(torch.tensor([[-1, 1], [1, 0]]), targets, 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1 or None, got 0"):
        accuracy(targets, targets, 2, batch_size=0)
