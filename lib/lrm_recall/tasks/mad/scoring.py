"""The accuracies of a MAD task.

    N examples, L input length, V vocabulary size
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrm_recall.tasks.mqar import IGNORE


class MADAccuracy(NamedTuple):
    """Three readings of accuracy, each a fraction in [0, 1].

    mad-lab's scores are `macro`. Resona's section 4.2.1 says `sequence`, for MQAR and MAD alike; but as a mean over the
    benchmark's settings no model could then have more than 66% in memorization, where Table 1 has up to 89% (see
    `memorization.py`: 16 facts an example, of which not all were ever shown).
    """

    macro: float  # mean over classes of the share of a class's targets that are right (mad-lab's)
    position: float  # plain: share of all scored positions that are right
    sequence: float  # share of examples in which all scored positions are right


def accuracy(
    predictions: Tensor, targets: Tensor, vocab_size: int, *, batch_size: int | None = 128
) -> MADAccuracy:
    """Score predictions against targets.

    mad-lab's macro accuracy is torchmetrics' MulticlassAccuracy, batch by batch, then averaged over the batches by
    their number of examples. Within a batch the mean goes over the classes that occur as a target or as a
    prediction at a scored position: a token that is never an answer but was predicted counts as a class with
    accuracy 0.

    Args:
        predictions: [N, L] token ids, or [N, L, V] logits, of which the largest counts.
        targets: [N, L] int64, -100 where nothing is scored; a batch without any target counts as 0, as in
            torchmetrics.
        vocab_size: V.
        batch_size: examples a batch of `macro`, in order; mad-lab evaluates 128 at a time. None: all at once, which
            does not depend on the order of the examples.

    Raises:
        ValueError: shapes differ, a token outside the vocabulary, nothing is scored at all.
    """
    if predictions.dim() == targets.dim() + 1 and predictions.is_floating_point():
        predictions = predictions.argmax(-1)  # [N, L]
    if predictions.shape != targets.shape or targets.dim() != 2:
        raise ValueError(f"predictions must be [N, L] token ids or [N, L, V] logits for targets [N, L], got "
                         f"{list(predictions.shape)} and {list(targets.shape)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
    scored = targets != IGNORE  # [N, L]
    if not scored.any():
        raise ValueError(f"nothing is scored: all {targets.numel()} targets are {IGNORE}")
    for name, tokens in (("predictions", predictions), ("targets", targets)):
        tokens = tokens[scored]
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(f"{name} must be tokens below vocab_size ({vocab_size}), got {int(tokens.min())} ... "
                             f"{int(tokens.max())}")
    right = (predictions == targets) & scored  # [N, L]
    whole = (right | ~scored).all(1)[scored.any(1)]  # examples that ask something
    batches = zip(predictions.split(batch_size or len(targets)), targets.split(batch_size or len(targets)), strict=True)
    macro = sum(_macro(predicted, wanted, vocab_size) * len(wanted) for predicted, wanted in batches) / len(targets)
    return MADAccuracy(macro, right.sum().item() / scored.sum().item(), whole.double().mean().item())


def _macro(predictions: Tensor, targets: Tensor, vocab_size: int) -> float:
    """Mean over the classes that occur of the share of each class's targets that are right."""
    scored = targets != IGNORE  # [n, L]
    predicted, wanted = predictions[scored], targets[scored]
    hits = torch.bincount(wanted[predicted == wanted], minlength=vocab_size)  # [V]
    targets_of = torch.bincount(wanted, minlength=vocab_size)  # [V]
    occurs = (targets_of + torch.bincount(predicted, minlength=vocab_size)) > 0  # [V]
    shares = hits.double() / targets_of.clamp(min=1)  # [V]
    return (shares.sum() / occurs.sum().clamp(min=1)).item()
