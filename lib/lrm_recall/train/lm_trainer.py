"""transformers' Trainer for `LMRun`s: the paper's recipe (appendix A.4), what is logged, and how it is validated.

Cosine schedule to zero after a linear warm-up, AdamW (betas 0.9 and 0.999, matrices decayed and vectors not), gradients
clipped to a norm, the loss averaged over all tokens of the global batch whatever the number of processes and of
accumulated steps. Every `eval_every` steps the validation split is scored and a checkpoint saved, so the best of them
can be chosen, as the paper does.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from lrm_recall.evaluate.perplexity import ArticleWindows, collate, perplexity
from lrm_recall.ops.loss import IGNORED
from lrm_recall.train.lm_checkpoints import MarkComplete
from lrm_recall.train.lm_data import TrainingSequences, chunk_finder
from lrm_recall.train.lm_graph import ReplayedStep

if TYPE_CHECKING:
    from lrm_recall.data.prepared import Prepared
    from lrm_recall.model import RecurrentLM
    from lrm_recall.train.language_model import LMRun

Progress = Callable[[dict[str, Any]], None]


class LMTrainer(Trainer):
    """The Trainer of one run.

    Its log (`state.log_history`, which a checkpoint carries) has two kinds of entries: every `log_every` steps loss
    (mean over them, in nats a token), grad_norm and learning_rate of the last, tokens and seconds (of training, without
    validation and saving) since the entry before; every `eval_every` steps eval_loss.

    On one GPU forward and backward pass are replayed (`lrm_recall.train.lm_graph`), every batch as long as the run's
    sequences.
    """

    replays = True  # on a GPU; False: kernel by kernel

    def __init__(
        self, run: LMRun, model: RecurrentLM, prepared: Prepared, folder: Path, device: torch.device,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        arguments = training_arguments(run, folder, device)
        self.finder = chunk_finder(run.chunks, run.resona, prepared)
        sequences = TrainingSequences(
            prepared, run.length, packed=run.packed, count=run.steps * run.batch_size, seed=run.seed,
            finder=self.finder,
        )  # fmt: skip
        self._clock = _Clock()
        replays = self.replays and arguments.device.type == "cuda" and arguments.world_size == 1
        super().__init__(
            model, arguments, data_collator=partial(collate, length=run.length if replays else 0),
            train_dataset=sequences, eval_dataset=ArticleWindows(prepared, "validation", run.length),
            callbacks=[MarkComplete(), self._clock],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self._run, self._prepared, self._progress = run, prepared, progress
        self._tokens = torch.zeros((), dtype=torch.int64, device=arguments.device)
        self._replayed = ReplayedStep(super().training_step) if replays else None

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None):
        self._tokens += (inputs["labels"] != IGNORED).sum().to(self._tokens.device)
        step = super().training_step if self._replayed is None else self._replayed
        return step(model, inputs, num_items_in_batch)

    def train(self, *args: Any, **options: Any) -> Any:
        """As the Trainer's; what the replays held is free afterwards."""
        try:
            return super().train(*args, **options)
        finally:
            if self._replayed is not None:
                self._replayed.close()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Validation loss in nats a token: `lrm_recall.evaluate.perplexity`, every token once."""
        scored = perplexity(
            self.model, self._prepared, "validation", self._run.length, batch_size=self._run.batch_size,
            finder=self.finder, bf16=self._run.bf16,
        )  # fmt: skip
        metrics = {f"{metric_key_prefix}_loss": scored.loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with tokens and seconds; a loss that is no finite number ends the run.

        Raises:
            FloatingPointError: training has diverged.
        """
        step = self.state.global_step
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise FloatingPointError(f"training diverged by step {step} of {self._run.steps} at learning rate "
                                         f"{self._run.learning_rate}: {name} {logs[name]}")
        if "loss" in logs:
            tokens = self.accelerator.reduce(self._tokens.clone(), "sum") if self.args.world_size > 1 else self._tokens
            logs |= {"tokens": int(tokens), "seconds": time.perf_counter() - self._clock.start}
            self._tokens.zero_()
            self._clock.restart()
        super().log(logs, start_time)
        if self._progress is not None and self.args.should_log:
            for entry in history(self.state.log_history[-1:]):
                self._progress(entry)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices alone: zero is no neutral value for rates, time steps and temperatures."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]


def training_arguments(run: LMRun, folder: Path, device: torch.device) -> TrainingArguments:
    """The Trainer's arguments of a run in this process, one of as many as torchrun or accelerate started."""
    processes = _processes()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch_size // (processes * run.accumulation),
        gradient_accumulation_steps=run.accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(run.warmup * run.steps),
        optim="adamw_torch_fused",
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        bf16=run.bf16,
        seed=run.seed,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if processes > 1 and device.type == "cpu" else None,
        train_sampling_strategy="sequential",  # TrainingSequences has the order
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type != "cpu",
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=run.eval_every,
        save_strategy="steps",
        save_steps=run.eval_every,
        save_total_limit=2,  # the best and the last: with 1, the Trainer removes the last one when it ends
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs take one process each; otherwise the Trainer would copy the model to all
    return arguments


def check_processes(run: LMRun, device: torch.device) -> None:
    """Raise ValueError where the batch cannot be divided among the processes, or a GPU is named by its number."""
    if run.batch_size % (_processes() * run.accumulation):
        raise ValueError(f"batch_size {run.batch_size} cannot be divided among {_processes()} processes with "
                         f"{run.accumulation} accumulated steps")
    if device.index is not None:
        raise ValueError(f"device {device} names one GPU of several; use 'cuda', and CUDA_VISIBLE_DEVICES to choose")


def history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of the Trainer's log that a row keeps: {"step", "loss", ...} and {"step", "valid_loss"}."""
    entries = []
    for entry in log:
        if "eval_loss" in entry:
            entries.append({"step": entry["step"], "valid_loss": entry["eval_loss"]})
        elif "loss" in entry:
            names = ("step", "loss", "grad_norm", "learning_rate", "tokens", "seconds")
            entries.append({name: entry[name] for name in names})
    return entries


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep the bars of transformers (of reading and writing weights) away from the sweep's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _processes() -> int:
    """How many processes torchrun or accelerate started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _Clock(TrainerCallback):
    """Counts the seconds of training: starts again after validation and after a checkpoint."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()

    def on_train_begin(self, *_, **__) -> None:
        self.restart()

    def on_evaluate(self, *_, **__) -> None:
        self.restart()

    def on_save(self, *_, **__) -> None:
        self.restart()
