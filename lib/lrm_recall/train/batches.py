"""What training reads: examples with a number of questions each, in batches.

N examples, L positions of an example, P questions of an example (padded where examples ask different numbers)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100  # the answer of a question that is not there; F.cross_entropy leaves it out of sum and mean


class Split(NamedTuple):
    """Examples; a batch of them has the same form."""

    inputs: Tensor  # [N, L] int64
    positions: Tensor  # [N, P] int64, where the questions stand; anything in range where there is none
    answers: Tensor  # [N, P] int64; IGNORE where there is no question

    def to(self, device: torch.device) -> Split:
        """The same examples on a device."""
        return Split(*(tensor.to(device) for tensor in self))

    def rows(self, rows: Tensor) -> Split:
        """The examples of the given rows [M] int64."""
        return Split(*(tensor.index_select(0, rows) for tensor in self))


class Splits(NamedTuple):
    train: Split
    valid: Split
    test: Split

    def to(self, device: torch.device) -> Splits:
        """The same examples on a device."""
        return Splits(*(split.to(device) for split in self))


def from_labels(inputs: Tensor, labels: Tensor) -> Split:
    """Examples from labels at every position; rows with fewer labels than the longest are padded at the end.

    Args:
        inputs: [N, L] int64.
        labels: [N, L] int64, IGNORE where nothing is asked.
    """
    asked = labels != IGNORE  # [N, L]
    P = int(asked.sum(1).max())
    # A stable sort brings the positions that are asked to the front of their row, in order.
    positions = (~asked).to(torch.uint8).argsort(dim=1, stable=True)[:, :P].contiguous()  # [N, L] -> [N, P]
    return Split(inputs, positions, labels.gather(1, positions))


def batches(split: Split, batch_size: int, order: torch.Generator | None = None) -> Iterator[Split]:
    """Batches of a split, the last one as small as it comes; shuffled when `order` is given."""
    if order is not None:
        rows = torch.randperm(len(split.inputs), generator=order).to(split.inputs.device)
        split = split.rows(rows)  # once an epoch; batches are views
    return map(Split._make, zip(*(tensor.split(batch_size) for tensor in split), strict=True))


def padded(split: Split, batch_size: int) -> Split:
    """A split filled up to whole batches with examples that ask nothing, copies of the first one."""
    missing = -len(split.inputs) % batch_size
    filling = Split(*(tensor[:1].expand(missing, -1) for tensor in split))
    filling = filling._replace(answers=torch.full_like(filling.answers, IGNORE))
    return Split(*(torch.cat(tensors) for tensors in zip(split, filling, strict=True)))
