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

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.options import check_options
from lrm_recall.tasks.mqar import accuracy, check_arguments, mqar, split_seed
from lrm_recall.train.batches import Splits, from_labels
from lrm_recall.train.loop import logits_of_questions
from lrm_recall.train.optimise import FitSettings
from lrm_recall.train.small import check_chunk_size, modules_of_run, train_and_score, variant_name
from lrm_recall.train.start import initial_model

_making = threading.Lock()  # else threads that begin together would each make the same data


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
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # as in FitSettings

    def __post_init__(self) -> None:
        check_options(type(self), asdict(self), "MQARRun")
        for name in ("num_train", "num_valid", "num_test", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.to_fit_settings()
        check_arguments(num_examples=self.num_train, seed=self.seed, **self._task_arguments())
        self.to_model_config()
        check_chunk_size(self.resona, self.input_length)

    @property
    def variant(self) -> str:
        """As in Table 11, see `variant_name`."""
        return variant_name(self.resona)

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

    def to_fit_settings(self) -> FitSettings:
        """How this run is trained."""
        names = ("learning_rate", "batch_size", "max_epochs", "warmup", "weight_decay", "target_accuracy", "seed",
                 "precision")
        return FitSettings(**{name: getattr(self, name) for name in names})

    def _task_arguments(self) -> dict[str, Any]:
        names = ("vocab_size", "input_length", "num_kv_pairs", "power_a", "generator")
        return {name: getattr(self, name) for name in names}


def run_mqar(
    run: MQARRun, progress: Callable[[dict[str, Any]], None] | None = None, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Train the model of `run` from scratch and score it, as `lrm_recall.train.small.train_and_score` does.

    Args:
        run: what to train.
        progress: called after every epoch with its entry of the history.
        device: where to train.

    Returns:
        as `train_and_score`, with the accuracies accuracy (per labelled position) and sequence_accuracy (all of a
        sequence's answers right).
    """
    return train_and_score(
        run.to_fit_settings(),
        splits=partial(mqar_splits, run),
        model=lambda: initial_model(run.to_model_config(), run.seed),
        logits=logits_of_questions,
        accuracies=_accuracies,
        device=torch.device(device),
        threads=run.threads,
        progress=progress,
    )


def code_modules(run: MQARRun) -> list[str]:
    """Modules whose code, with all they import, decides the result of a run: the argument of `code_hash`."""
    return modules_of_run("lrm_recall.train.synthetic", run.mixer, run.resona)


def mqar_splits(run: MQARRun) -> Splits:
    """The data of a run, on the CPU; made once a process for runs that share it."""
    with _making:
        return _made_splits(
            sizes=(run.num_train, run.num_valid, run.num_test),
            seed=run.seed,
            random_non_queries=run.random_non_queries,
            **run._task_arguments(),
        )


@lru_cache(maxsize=4)
def _made_splits(*, sizes: tuple[int, ...], seed: int, **arguments: Any) -> Splits:
    splits = []
    for name, size in zip(Splits._fields, sizes, strict=True):
        data = mqar(num_examples=size, seed=split_seed(seed, name), **arguments)
        splits.append(from_labels(data.inputs, data.labels))
    return Splits(*splits)


def _accuracies(predictions: Tensor, answers: Tensor) -> dict[str, float]:
    found = accuracy(predictions, answers)
    return {"accuracy": found.position, "sequence_accuracy": found.sequence}
