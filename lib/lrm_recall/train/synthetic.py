"""Training one small model on multi-query associative recall: what a run is, and running it.

A run is a frozen `MQARRun`; `run_mqar(run)` trains from scratch and returns plain numbers (Resona, section
4.2.1 and appendix A.3). Everything that decides the result stands in the run, so the same run gives the same
metrics on the same machine.

The optimiser follows zoology (Arora et al. 2024), from which appendix A.3 takes its settings: AdamW, weight
decay 0.1, cosine to zero, cross entropy over labelled positions, output layer tied to the embedding, blocks
without a channel mixer. What differs, and why:
    the rate first rises over 5% of the steps, as in the paper's other experiments (appendix A.4): without it, a rate
        of 0.01 can leave a Transformer with Resona stuck;
    the cosine falls at every step, not at every epoch: a run of few epochs should not anneal in a few jumps;
    gradients are clipped to norm 1, as in the paper's other experiments (appendix A.4);
    vectors (norm gains, biases, Mamba2's A_log and dt_bias, Resona's temperature) are not decayed, because
        zero is no neutral value for them; matrices are, the embedding included, as in zoology;
    the embeddings have no dropout (zoology: 0.1).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.model import RecurrentLM
from lrm_recall.options import accepted_options, check_options
from lrm_recall.resona.layer import Resona
from lrm_recall.tasks.mqar import IGNORE, MQARData, accuracy, check_arguments, mqar, split_seed
from lrm_recall.train.memory import peak_mb, reset_peak

_MAX_GRAD_NORM = 1.0
_initialising = threading.Lock()  # torch's initialisers draw from one global stream


class DivergedError(RuntimeError):
    """A loss that is no finite number: names the epoch and the learning rate."""


@dataclass(frozen=True, kw_only=True)
class MQARRun:
    """Everything that decides the outcome of one run; plain JSON through `dataclasses.asdict`.

    Wrong names and types, sizes that cannot be, and whatever the model's own configuration refuses raise
    ValueError.
    """

    # the model
    mixer: str
    mixer_args: dict[str, Any] = field(default_factory=dict)
    layer_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    d_model: int
    num_layers: int = 4
    mlp: Literal["none", "swiglu"] = "none"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    tie_embeddings: bool = True
    embedding_range: float = 0.02  # std of the initial embeddings
    resona: dict[str, Any] | None = None  # {"layers": [0], "chunk_size": 2, "top_k": 1, ...}
    # the data
    vocab_size: int = 8192
    input_length: int
    num_kv_pairs: int
    power_a: float = 0.01
    random_non_queries: bool = False
    generator: Literal["exact", "fast"] = "exact"
    num_train: int = 20_000
    num_valid: int = 1_000
    num_test: int = 1_000
    # the training
    learning_rate: float
    batch_size: int = 64
    max_epochs: int = 16
    warmup: float = 0.05  # share of the steps over which the learning rate rises
    weight_decay: float = 0.1
    target_accuracy: float | None = 0.999  # of validation: stop after the epoch that reaches it; None: never
    seed: int = 0  # of the data, the initial weights and the order of the examples
    threads: int = 1  # of torch on a CPU; they change the order of sums, so they are part of the run

    def __post_init__(self) -> None:
        check_options(type(self), asdict(self), "MQARRun")
        for name in ("num_train", "num_valid", "num_test", "batch_size", "max_epochs", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above zero, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number, zero or above, got {self.weight_decay}")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise ValueError(f"target_accuracy must lie in (0, 1] or be None, got {self.target_accuracy}")
        check_arguments(num_examples=self.num_train, seed=self.seed, **self._task_arguments())
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, 0 or more and below 1, got {self.warmup}")
        self.to_model_config()
        if self.resona is not None:
            default = accepted_options(Resona)["chunk_size"].default
            chunk_size = self.resona.get("chunk_size", default)
            if chunk_size >= self.input_length:
                raise ValueError(f"resona: chunk_size must be below input_length ({self.input_length}), got "
                                 f"{chunk_size}: no chunk would lie wholly before any position")

    @property
    def variant(self) -> str:
        """As in Table 11: "base", or "resona" and the layers that retrieve ("resona0", "resona0+2")."""
        return "base" if self.resona is None else "resona" + "+".join(map(str, self.resona["layers"]))

    def to_model_config(self) -> RecurrentLMConfig:
        """The model of this run."""
        return RecurrentLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            num_hidden_layers=self.num_layers,
            mixer=self.mixer,
            mixer_args=self.mixer_args,
            layer_overrides=self.layer_overrides,
            mlp=self.mlp,
            norm=self.norm,
            tie_word_embeddings=self.tie_embeddings,
            embedding_range=self.embedding_range,
            resona=self.resona,
            use_cache=False,
        )

    def _task_arguments(self) -> dict[str, Any]:
        names = ("vocab_size", "input_length", "num_kv_pairs", "power_a", "generator")
        return {name: getattr(self, name) for name in names}


class Split(NamedTuple):
    """Examples in the form that training reads: every row asks P questions, so nothing is ragged."""

    inputs: Tensor  # [N, L] int64
    positions: Tensor  # [N, P] int64, where the questions stand
    answers: Tensor  # [N, P] int64


class Splits(NamedTuple):
    train: Split
    valid: Split
    test: Split


def run_mqar(
    run: MQARRun, progress: Callable[[dict[str, Any]], None] | None = None, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Train the model of `run` from scratch and score it.

    Training stops after `max_epochs`, or after the first epoch whose validation accuracy reaches
    `target_accuracy`. The model of the last epoch is scored on the test set; the validation set serves early
    stopping and the choice of a learning rate alone. Threads may run several runs at once, but torch's number
    of threads belongs to the whole process, so those must agree on `threads`.

    Args:
        run: what to train.
        progress: called after every epoch with its entry of the history.
        device: where to train.

    Returns:
        metrics: accuracy (per labelled position) and sequence_accuracy (all of a sequence's answers right),
            both on the test set; valid_accuracy (per position), test_loss, epochs, steps, parameters,
            state_size (elements that one sequence of the input length carries), tokens_per_s (training, all
            positions counted).
        history: one dict an epoch: epoch, train_loss (mean over the epoch), valid_accuracy, seconds (of
            training).
        runtime_s: wall-clock seconds, data and scoring included.
        peak_memory_mb: see `lrm_recall.train.memory`.

    Raises:
        DivergedError: the training or validation loss of an epoch is not a finite number.
    """
    device = torch.device(device)
    begin = time.perf_counter()
    reset_peak(device)
    with _torch_threads(run.threads):
        splits = _splits(run, device)
        model = _initial_model(run).to(device)
        history = _train(run, model, splits, progress)
        predictions, test_loss = _predict(run, model, splits.test)
        test = accuracy(predictions, splits.test.answers)
    seconds = sum(epoch["seconds"] for epoch in history)
    epochs, steps = len(history), len(history) * _steps_per_epoch(run)
    return {
        "metrics": {
            "accuracy": test.position,
            "sequence_accuracy": test.sequence,
            "valid_accuracy": history[-1]["valid_accuracy"],
            "test_loss": test_loss,
            "epochs": epochs,
            "steps": steps,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "state_size": model.state_size(run.input_length),
            "tokens_per_s": epochs * run.num_train * run.input_length / seconds,
        },
        "history": history,
        "runtime_s": time.perf_counter() - begin,
        "peak_memory_mb": peak_mb(device),
    }


def code_modules(run: MQARRun) -> list[str]:
    """Modules whose code, with all they import, decides the result of a run: the argument of `code_hash`."""
    retrieval = [] if run.resona is None else ["lrm_recall.resona.layer"]
    never_run = ["-lrm_recall.checkpoints", "-lrm_recall.decode"]  # a run neither loads a model nor generates
    return ["lrm_recall.train.synthetic", f"lrm_recall.mixers.{run.mixer}", *retrieval, *never_run]


def _train(
    run: MQARRun, model: RecurrentLM, splits: Splits, progress: Callable[[dict[str, Any]], None] | None
) -> list[dict[str, Any]]:
    """Train in place; the history."""
    optimizer = _optimizer(run, model)
    total_steps = run.max_epochs * _steps_per_epoch(run)
    order = torch.Generator().manual_seed(run.seed)
    history: list[dict[str, Any]] = []
    step = 0
    for epoch in range(1, run.max_epochs + 1):
        start = time.perf_counter()
        model.train()
        loss_sum = torch.zeros((), device=splits.train.inputs.device)
        for batch in _batches(splits.train, run.batch_size, order):
            for group in optimizer.param_groups:
                group["lr"] = run.learning_rate * _schedule(step / total_steps, run.warmup)
            loss = F.cross_entropy(_logits(model, batch), batch.answers.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
            optimizer.step()
            loss_sum += loss.detach() * len(batch.inputs)  # no .item() here: it would wait for the device
            step += 1
        train_loss = loss_sum.item() / run.num_train  # waits for the device, so the time below is whole
        seconds = time.perf_counter() - start
        predictions, valid_loss = _predict(run, model, splits.valid)
        if not math.isfinite(train_loss + valid_loss):
            raise DivergedError(
                f"training diverged in epoch {epoch} of {run.max_epochs} at learning rate {run.learning_rate}: "
                f"train loss {train_loss}, validation loss {valid_loss}"
            )
        history.append({
            "epoch": epoch,
            "train_loss": train_loss,
            "valid_accuracy": accuracy(predictions, splits.valid.answers).position,
            "seconds": seconds,
        })
        if progress is not None:
            progress(history[-1])
        if run.target_accuracy is not None and history[-1]["valid_accuracy"] >= run.target_accuracy:
            break
    return history


def _schedule(done: float, warmup: float) -> float:
    """Share of the learning rate when a share `done` of the steps is over: linear up, then half a cosine to zero."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _optimizer(run: MQARRun, model: RecurrentLM) -> torch.optim.Optimizer:
    """AdamW, matrices decayed and vectors not; fused takes a third of foreach's time on a CPU too."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=run.learning_rate, weight_decay=run.weight_decay, fused=True)


def _logits(model: RecurrentLM, batch: Split) -> Tensor:
    """Logits of the questions alone: [B * P, V]. All L positions would cost L / P times as much."""
    hidden = model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state  # [B, L, D]
    rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)  # [B, 1]
    return model.lm_head(hidden[rows, batch.positions].flatten(0, 1))  # [B, P, D] -> [B * P, D] -> [B * P, V]


@torch.no_grad()
def _predict(run: MQARRun, model: RecurrentLM, split: Split) -> tuple[Tensor, float]:
    """Predicted answers [N, P] int64, and the mean loss."""
    model.eval()
    predictions, loss_sum = [], 0.0
    for batch in _batches(split, run.batch_size):
        logits = _logits(model, batch)  # [B * P, V]
        predictions.append(logits.argmax(dim=-1).view_as(batch.answers))
        loss_sum += F.cross_entropy(logits, batch.answers.flatten(), reduction="sum").item()
    return torch.cat(predictions), loss_sum / split.answers.numel()


def _batches(split: Split, batch_size: int, order: torch.Generator | None = None) -> Iterator[Split]:
    """Batches of a split, the last one as small as it comes; shuffled when `order` is given."""
    if order is not None:
        rows = torch.randperm(len(split.inputs), generator=order).to(split.inputs.device)
        split = Split(*(tensor.index_select(0, rows) for tensor in split))  # once an epoch; batches are views
    return map(Split._make, zip(*(tensor.split(batch_size) for tensor in split), strict=True))


def _steps_per_epoch(run: MQARRun) -> int:
    return -(-run.num_train // run.batch_size)


def _initial_model(run: MQARRun) -> RecurrentLM:
    """The model with the initial weights of this seed, the caller's random state left as it was."""
    with _initialising, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(run.seed)
        return RecurrentLM(run.to_model_config())


def _splits(run: MQARRun, device: torch.device) -> Splits:
    """The data of a run on a device; made once a process for runs that share it."""
    made = _made_splits(
        sizes=(run.num_train, run.num_valid, run.num_test),
        seed=run.seed,
        random_non_queries=run.random_non_queries,
        **run._task_arguments(),
    )
    return Splits(*(Split(*(tensor.to(device) for tensor in split)) for split in made))


@lru_cache(maxsize=4)
def _made_splits(*, sizes: tuple[int, ...], seed: int, **arguments: Any) -> Splits:
    splits = []
    for name, size in zip(Splits._fields, sizes, strict=True):
        data = mqar(num_examples=size, seed=split_seed(seed, name), **arguments)
        splits.append(_gather_questions(data))
    return Splits(*splits)


def _gather_questions(data: MQARData) -> Split:
    """Positions and answers [N, P] from labels [N, L] that have P labels in every row."""
    asked = data.labels != IGNORE  # [N, L]
    rows = len(data.labels)
    positions = asked.nonzero()[:, 1].view(rows, -1)  # [N * P, 2] -> [N, P]
    return Split(data.inputs, positions, data.labels[asked].view(rows, -1))


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    """Run with this many threads of torch, and give back the old number."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
