"""One small model, trained from scratch and scored: what the runs of MQAR and of MAD have in common.

N examples, L positions of an example, P questions of an example
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrm_recall.options import accepted_options
from lrm_recall.resona.layer import Resona
from lrm_recall.train.batches import Splits
from lrm_recall.train.device import own_stream
from lrm_recall.train.learner import Logits
from lrm_recall.train.loop import fit
from lrm_recall.train.memory import peak_mb, reset_peak
from lrm_recall.train.optimise import FitSettings
from lrm_recall.train.start import torch_threads

Accuracies = Callable[[Tensor, Tensor], Mapping[str, float]]


def train_and_score(
    settings: FitSettings,
    *,
    splits: Callable[[], Splits],
    model: Callable[[], nn.Module],
    logits: Logits,
    accuracies: Accuracies,
    device: torch.device,
    threads: int,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """What a run returns.

    Training stops after `max_epochs`, or after the first epoch whose validation accuracy reaches `target_accuracy`.
    The model of the last epoch is scored on the test set; the validation set serves early stopping and the choice of a
    learning rate alone. Threads may run several runs at once, but torch's number of threads belongs to the whole
    process, so those must agree on `threads`.

    Args:
        settings: how to train.
        splits: gives the examples, on the CPU.
        model: gives the model with its initial weights, on the CPU.
        logits: as for `lrm_recall.train.loop.fit`.
        accuracies: by name, from predicted and right answers [N, P] int64 on the CPU. The first is that of validation.
        device: where to train.
        threads: of torch on a CPU.
        progress: called after every epoch with its entry of the history.

    Returns:
        metrics: the accuracies on the test set; valid_accuracy, test_loss, epochs, steps, parameters, state_size
            (elements that one sequence of the input length carries), tokens_per_s (training, all positions counted).
        history: one dict an epoch: epoch, train_loss (mean over the epoch), valid_accuracy, seconds (of training).
        runtime_s: wall-clock seconds, data and scoring included.
        peak_memory_mb: see `lrm_recall.train.memory`.

    Raises:
        DivergedError: the training or validation loss of an epoch is not a finite number.
    """
    begin = time.perf_counter()
    reset_peak(device)

    def valid_accuracy(predictions: Tensor, answers: Tensor) -> float:
        return next(iter(accuracies(predictions, answers).values()))

    with own_stream(device), torch_threads(threads, device):
        examples, trained = splits(), model().to(device)
        fitted = fit(settings, trained, examples.to(device), logits, valid_accuracy, progress)
    num_train, length = examples.train.inputs.shape  # N, L
    epochs, seconds = len(fitted.history), sum(epoch["seconds"] for epoch in fitted.history)
    return {
        "metrics": {
            **accuracies(fitted.predictions, examples.test.answers),
            "valid_accuracy": fitted.history[-1]["valid_accuracy"],
            "test_loss": fitted.test_loss,
            "epochs": epochs,
            "steps": epochs * settings.steps_per_epoch(num_train),
            "parameters": sum(parameter.numel() for parameter in trained.parameters()),
            "state_size": trained.state_size(length),
            "tokens_per_s": epochs * num_train * length / seconds,
        },
        "history": fitted.history,
        "runtime_s": time.perf_counter() - begin,
        "peak_memory_mb": peak_mb(device),
    }


def variant_name(resona: Mapping[str, Any] | None) -> str:
    """As in Table 11: "base", or "resona" and the layers that retrieve ("resona0", "resona0+2")."""
    return "base" if resona is None else "resona" + "+".join(map(str, resona["layers"]))


def check_chunk_size(resona: Mapping[str, Any] | None, input_length: int) -> None:
    """Raise ValueError unless chunks are short enough for a position of the input to look into one."""
    if resona is None:
        return
    chunk_size = resona.get("chunk_size", accepted_options(Resona)["chunk_size"].default)
    if chunk_size >= input_length:
        raise ValueError(f"resona: chunk_size must be below the input length ({input_length}), got {chunk_size}: no "
                         "chunk would lie wholly before any position")


def modules_of_run(module: str, mixer: str, resona: Mapping[str, Any] | None) -> list[str]:
    """Modules whose code, with all they import, decides the result of a run that `module` describes."""
    retrieval = [] if resona is None else ["lrm_recall.resona.layer"]
    never_run = ["-lrm_recall.checkpoints", "-lrm_recall.decode"]  # a run neither loads a model nor generates
    return [module, f"lrm_recall.mixers.{mixer}", *retrieval, *never_run]
