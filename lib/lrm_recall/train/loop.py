"""Training a small model: `fit`, which every synthetic task shares.

A task gives its examples as `Splits` (train, valid, test; see batches.py: inputs [N, L], positions [N, P] and answers
[N, P], padded with IGNORE where examples ask different numbers of questions; `from_labels` makes them), a model, and
two functions:

    logits(model, batch)        logits of the batch's questions alone [B * P, V]; `logits_of_questions` for a
                                RecurrentLM. Capturable: nothing that waits for the device.
    score(predictions, answers) the accuracy, from predicted and right answers [N, P] int64 on the CPU

    fitted = fit(FitSettings(learning_rate=1e-3, batch_size=128, max_epochs=200), model, splits, logits, score)
    fitted.history      one dict an epoch: epoch, train_loss, valid_accuracy, seconds (of training)
    fitted.predictions  of the test split [N, P] int64 on the CPU, from the last epoch's model; fitted.test_loss

The model and the splits are on one device already. On a CPU this is a plain loop (plain.py). On a GPU a step is
captured once and replayed (graph.py); a model that cannot be captured is trained in the plain loop, with a warning.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrm_recall.model import RecurrentLM
from lrm_recall.train.batches import Split, Splits
from lrm_recall.train.device import own_stream, turn
from lrm_recall.train.graph import CaptureError, GraphLoop
from lrm_recall.train.learner import Logits
from lrm_recall.train.optimise import FitSettings
from lrm_recall.train.plain import PlainLoop

Score = Callable[[Tensor, Tensor], float]


class DivergedError(RuntimeError):
    """A loss that is no finite number: names the epoch and the learning rate."""


class Fitted(NamedTuple):
    history: list[dict[str, Any]]
    predictions: Tensor  # [N, P] int64 on the CPU, of the test split
    test_loss: float  # mean over its questions


def fit(
    settings: FitSettings,
    model: nn.Module,
    splits: Splits,
    logits: Logits,
    score: Score,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Fitted:
    """Train a model in place and let it answer the test split.

    Training stops after `max_epochs`, or after the first epoch whose validation accuracy reaches `target_accuracy`.

    Args:
        settings: how.
        model: what; its parameters are changed.
        splits: examples, on the model's device.
        logits, score: see above.
        progress: called after every epoch with its entry of the history.

    Raises:
        DivergedError: the training or validation loss of an epoch is not a finite number.
    """
    with (
        own_stream(splits.train.inputs.device),
        contextlib.closing(_loop(settings, model, splits, logits)) as loop,
    ):
        return _fit(loop, settings, splits, score, progress)


def logits_of_questions(model: RecurrentLM, batch: Split) -> Tensor:
    """Logits of the questions alone: [B * P, V]. All L positions would cost L / P times as much."""
    hidden = model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state  # [B, L, D]
    rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)  # [B, 1]
    return model.lm_head(hidden[rows, batch.positions].flatten(0, 1))  # [B, P, D] -> [B * P, D] -> [B * P, V]


def _fit(
    loop: GraphLoop | PlainLoop,
    settings: FitSettings,
    splits: Splits,
    score: Score,
    progress: Callable[[dict[str, Any]], None] | None,
) -> Fitted:
    valid_answers = splits.valid.answers.cpu()
    history: list[dict[str, Any]] = []
    for epoch in range(1, settings.max_epochs + 1):
        start = time.perf_counter()
        train_loss = loop.epoch()  # waits for the device, so the time below is whole
        seconds = time.perf_counter() - start
        predictions, valid_loss = loop.predict(splits.valid)
        if not math.isfinite(train_loss + valid_loss):
            raise DivergedError(
                f"training diverged in epoch {epoch} of {settings.max_epochs} at learning rate "
                f"{settings.learning_rate}: train loss {train_loss}, validation loss {valid_loss}"
            )
        history.append({
            "epoch": epoch,
            "train_loss": train_loss,
            "valid_accuracy": score(predictions.cpu(), valid_answers),
            "seconds": seconds,
        })
        if progress is not None:
            progress(history[-1])
        if settings.target_accuracy is not None and history[-1]["valid_accuracy"] >= settings.target_accuracy:
            break
    predictions, test_loss = loop.predict(splits.test)
    return Fitted(history, predictions.cpu(), test_loss)


def _loop(settings: FitSettings, model: nn.Module, splits: Splits, logits: Logits) -> GraphLoop | PlainLoop:
    """How the model is trained on its device."""
    if splits.train.inputs.device.type != "cuda":
        return PlainLoop(settings, model, splits.train, logits)
    try:
        return GraphLoop(settings, model, splits, logits)
    except CaptureError as error:
        warnings.warn(f"{_name(model)} is trained without a CUDA graph, several times slower: {error}", RuntimeWarning,
                      stacklevel=3)
        return PlainLoop(settings, model, splits.train, logits, functools.partial(turn, settings.precision))


def _name(model: nn.Module) -> str:
    """How a warning names a model: by its mixer, where it has one."""
    return getattr(getattr(model, "config", None), "mixer", type(model).__name__)
