"""The loop as it is written: the only one on a CPU, on a GPU the one for models that cannot be captured.

B batch, P questions of an example, V vocabulary size
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrm_recall.train.batches import IGNORE, Split, batches
from lrm_recall.train.learner import Learner, Logits
from lrm_recall.train.optimise import FitSettings


class PlainLoop:
    """Training and scoring, kernel by kernel.

    Args:
        settings, model, train, logits: as for `lrm_recall.train.loop.fit`.
        turn: makes the context of every step; threads that share a GPU take turns.
    """

    def __init__(
        self,
        settings: FitSettings,
        model: nn.Module,
        train: Split,
        logits: Logits,
        turn: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self._settings, self._train, self._turn = settings, train, turn
        self._learner = Learner(settings, model, logits)
        self._order = torch.Generator().manual_seed(settings.seed)
        self._total_steps = settings.max_epochs * settings.steps_per_epoch(len(train.inputs))
        self._step = 0

    def epoch(self) -> float:
        """Train on every example once; the mean loss."""
        loss_sum = torch.zeros((), device=self._train.inputs.device)
        for batch in batches(self._train, self._settings.batch_size, self._order):
            for group in self._learner.optimizer.param_groups:
                group["lr"] = self._settings.rate(self._step / self._total_steps)
            with self._turn():
                loss = self._learner.descend(batch)
            loss_sum += loss * len(batch.inputs)  # no .item() here: it would wait for the device
            self._step += 1
        return loss_sum.item() / len(self._train.inputs)

    def predict(self, split: Split) -> tuple[Tensor, float]:
        """Predicted answers [N, P] int64, and the mean loss of a question."""
        predictions, loss_sum = [], 0.0
        for batch in batches(split, self._settings.batch_size):
            with self._turn():
                logits = self._learner.answer(batch)  # [B * P, V]
            predictions.append(logits.argmax(dim=-1).view_as(batch.answers))
            loss_sum += F.cross_entropy(logits, batch.answers.flatten(), reduction="sum", ignore_index=IGNORE).item()
        return torch.cat(predictions), loss_sum / questions(split)

    def close(self) -> None:
        """There is nothing to give back; a GraphLoop has."""


def questions(split: Split) -> int:
    """How many questions the examples ask."""
    return int((split.answers != IGNORE).sum())
