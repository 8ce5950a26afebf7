"""Training one small model on a task of Mechanistic Architecture Design (MAD): what a run is, and running it.

A run is a frozen `MADRun`; `run_mad(run)` trains from scratch and returns plain numbers (Resona, Table 1 and appendix
A.3). The training is mad-lab's (Poli et al. 2024, github.com/athms/mad-lab at 0f49a45), to whose "benchmark settings"
appendix A.3 refers: AdamW, 200 epochs in batches of 128, cosine to 1e-6, an end at an accuracy of 0.999, no warmup, no
clipping; RMSNorm, SwiGLU of 8/3 the width, output layer of its own. What differs, and why:
    a validation set stands beside mad-lab's two: it decides when training ends and which learning rate counts, where
        mad-lab asks the test set;
    the cosine falls at every step, not at every epoch;
    vectors (norm gains, biases, rates) are not decayed, because zero is no neutral value for them;
    matrices start from a normal distribution of standard deviation 0.02, as everywhere in this library (mad-lab:
        torch's own, 0.05 at this width), and the output layer has no bias;
    everything is float32 unless `precision` says otherwise (mad-lab: bfloat16 mixed).

Depth. Appendix A.3 has "a 4-hybrid block configuration, where each block consists of a linear recurrent layer followed
by a SwiGLU layer". That is four such pairs, or four layers, two pairs: mad-lab's standard model, which its README calls
"a 4-layer model, composed of multi-head attention, SwiGLU, multi-head attention, SwiGLU". The default is two pairs,
because the same sentence goes on "we follow the benchmark settings from Poli et al.", section 4.2.1 speaks of "a 4
layer model" with a hidden size of 128, mad-lab's width, and all of Poli et al.'s scores are of that depth;
`num_blocks=4` is the other reading, and a field of every row.

Which blocks retrieve, the paper does not say for MAD; `resona` names them. The grid's default is the second of two: the
keys of fuzzy recall have up to three tokens, and in the first block a query knows its own token alone.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.model import RecurrentLM
from lrm_recall.options import check_options
from lrm_recall.tasks.mad import MADTask, accuracy, mad_data
from lrm_recall.tasks.mad.task import check_seed
from lrm_recall.tasks.mqar import split_seed
from lrm_recall.train.batches import Splits, from_labels
from lrm_recall.train.loop import logits_of_questions
from lrm_recall.train.mad_autoencoder import AutoEncoder, logits_of_decoder
from lrm_recall.train.optimise import FitSettings
from lrm_recall.train.small import check_chunk_size, modules_of_run, train_and_score, variant_name
from lrm_recall.train.start import initial_model

_making = threading.Lock()  # else threads that begin together would each make the same data
_WIDTH_STEP = 16  # mad-lab rounds a SwiGLU's width up to a multiple of it


@dataclass(frozen=True, kw_only=True)
class MADRun:
    """Everything that decides the outcome of one run; plain JSON through `dataclasses.asdict`.

    Wrong names and types, sizes that cannot be, and whatever the model's own configuration refuses raise
    ValueError.
    """

    # the model
    mixer: str
    mixer_args: dict[str, Any] = field(default_factory=dict)
    d_model: int = 128
    num_blocks: int = 2  # each a mixer and a SwiGLU
    embedding_range: float = 0.02  # std of the initial embeddings
    resona: dict[str, Any] | None = None  # {"layers": [1], "chunk_size": 6, "top_k": 1, ...}; blocks count as layers
    # the data
    task: MADTask
    num_valid: int = 1_280
    # the training
    learning_rate: float
    weight_decay: float = 0.0
    min_learning_rate: float = 1e-6  # where the cosine ends
    batch_size: int = 128
    max_epochs: int = 200
    target_accuracy: float | None = 0.999  # macro, of validation: stop after the epoch that reaches it; None: never
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # as in FitSettings
    seed: int = 12345  # of the data (mad-lab's for the same seed), the initial weights and the order of the examples
    threads: int = 1  # of torch on a CPU; they change the order of sums, so they are part of the run

    def __post_init__(self) -> None:
        if not isinstance(self.task, MADTask):
            raise ValueError(f"task must be a MADTask, got {self.task!r:.80}")
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "task"}
        check_options(type(self), values, "MADRun")
        for name in ("num_valid", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_seed(self.seed)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above zero, got {self.learning_rate}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(f"min_learning_rate must lie in 0 ... learning_rate ({self.learning_rate}), got "
                             f"{self.min_learning_rate}")
        self.to_fit_settings()
        self.to_model_config()
        check_chunk_size(self.resona, self.task.input_length)

    @property
    def variant(self) -> str:
        """As in Table 1, blocks in the place of layers: see `variant_name`."""
        return variant_name(self.resona)

    def to_model_config(self) -> RecurrentLMConfig:
        """The model of this run, or its encoder where the task decodes the last position."""
        return RecurrentLMConfig(
            vocab_size=self.task.vocab_size,
            hidden_size=self.d_model,
            num_hidden_layers=self.num_blocks,
            mixer=self.mixer,
            mixer_args=self.mixer_args,
            mlp="swiglu",
            intermediate_size=max(1, -(-int(self.d_model * 8 / 3) // _WIDTH_STEP)) * _WIDTH_STEP,
            norm="rmsnorm",
            embedding_range=self.embedding_range,
            resona=self.resona,
            use_cache=False,
        )

    def to_fit_settings(self) -> FitSettings:
        """How the run is trained."""
        return FitSettings(
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            final_rate=self.min_learning_rate / self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=None,
            target_accuracy=self.target_accuracy,
            seed=self.seed,
            precision=self.precision,
        )


def run_mad(
    run: MADRun, progress: Callable[[dict[str, Any]], None] | None = None, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Train the model of `run` from scratch and score it, as `lrm_recall.train.small.train_and_score` does.

    Args:
        run: what to train.
        progress: called after every epoch with its entry of the history.
        device: where to train.

    Returns:
        as `train_and_score`, with the accuracies macro_accuracy (mad-lab's, the one that MAD scores are made of),
        accuracy (plain, per scored position) and sequence_accuracy (all of an example's answers right);
        valid_accuracy is macro.
    """
    return train_and_score(
        run.to_fit_settings(),
        splits=partial(mad_splits, run),
        model=partial(_initial_model, run),
        logits=logits_of_decoder if run.task.decodes_last_position else logits_of_questions,
        accuracies=partial(_accuracies, run.task),
        device=torch.device(device),
        threads=run.threads,
        progress=progress,
    )


def code_modules(run: MADRun) -> list[str]:
    """Modules whose code, with all they import, decides the result of a run: the argument of `code_hash`."""
    return modules_of_run("lrm_recall.train.mad", run.mixer, run.resona)


def _accuracies(task: MADTask, predictions: Tensor, answers: Tensor) -> dict[str, float]:
    found = accuracy(predictions, answers, task.vocab_size)
    return {"macro_accuracy": found.macro, "accuracy": found.position, "sequence_accuracy": found.sequence}


def _initial_model(run: MADRun) -> RecurrentLM | AutoEncoder:
    """The model with the initial weights of this run's seed."""
    model = initial_model(run.to_model_config(), run.seed)
    return AutoEncoder(model.model, run.task.input_length, run.seed) if run.task.decodes_last_position else model


def mad_splits(run: MADRun) -> Splits:
    """The data of a run, on the CPU; made once a process for runs that share it.

    The validation set is drawn as the test set is, from a seed of its own; the facts of memorization are those of the
    training set.
    """
    with _making:
        return _made_splits(run.task, run.num_valid, run.seed)


@lru_cache(maxsize=8)
def _made_splits(task: MADTask, num_valid: int, seed: int) -> Splits:
    made = mad_data(task, seed)
    asked = replace(task, num_train_examples=1, num_test_examples=num_valid)
    if task.task == "memorization" and task.kv_map_seed is None:
        asked = replace(asked, kv_map_seed=seed)
    valid = mad_data(asked, split_seed(seed, "valid")).test
    return Splits(*(from_labels(data.inputs, data.targets) for data in (made.train, valid, made.test)))
