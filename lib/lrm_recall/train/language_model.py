"""Train a small language model on real text and score it: Resona's section 4.2.2, Table 2.

    run = LMRun(mixer="gla", hidden_size=64, num_layers=2, corpus="squad", vocab_size=2048, own_tokenizer=True,
                length=256, steps=200, batch_size=8)
    result = run_lm(run)
    result["metrics"]["test_word_ppl"]

Where the recipe differs from appendix A.4, which names optimiser, schedule, decay, clipping and steps but no length,
batch, precision or betas: those four are fields or defaults here; parameters that are no matrices are not decayed;
articles are extended only where `augmentation` says so (the paper has a large model extend each).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.trainer_callback import TrainerState

from lrm_recall.code_hash import code_hash
from lrm_recall.config import RecurrentLMConfig
from lrm_recall.data.prepared import Prepared
from lrm_recall.data.retrieval import ChunkFinder
from lrm_recall.data.store import locked
from lrm_recall.evaluate.perplexity import Perplexity, perplexity
from lrm_recall.model import RecurrentLM
from lrm_recall.options import accepted_options, check_options
from lrm_recall.resona.layer import Resona
from lrm_recall.rows import run_key
from lrm_recall.train.lm_checkpoints import checkpoint, checkpoints_folder, drop_incomplete, keep_model, last_step
from lrm_recall.train.lm_data import prepared_corpus, tokenizer_of
from lrm_recall.train.lm_retrieval import retrieval_map
from lrm_recall.train.lm_speed import flops_per_token, utilisation
from lrm_recall.train.lm_trainer import LMTrainer, check_processes, history, no_bars
from lrm_recall.train.memory import peak_mb, reset_peak
from lrm_recall.train.start import torch_threads

EXPERIMENT = "language_model"
_BEHIND = 64  # tokens of another article that stand in front where the leak between articles is measured
_MAP_CHUNKS = 16  # chunks of an article in the map of what was retrieved


@dataclass(frozen=True, kw_only=True)
class LMRun:
    """Everything that decides the outcome of one run; plain JSON through `dataclasses.asdict`.

    Wrong names and types, sizes that cannot be, and whatever the model's own configuration refuses raise ValueError.
    """

    # the model
    mixer: str
    mixer_args: dict[str, Any] = field(default_factory=dict)
    layer_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    hidden_size: int
    num_layers: int
    mlp: Literal["swiglu", "none"] = "swiglu"
    intermediate_size: int | None = None  # of the SwiGLU; None: as in RecurrentLMConfig
    tie_embeddings: bool = True
    initializer_range: float = 0.02  # std of the initial weights; narrow models learn sooner with more
    resona: dict[str, Any] | None = None  # {"layers": [0, 12, 23], "chunk_size": 64, ...}
    chunks: Literal["search", "tf_idf"] = "search"  # what Resona reads: its own finds, or those found before training
    variant: Literal["base", "sp", "resona"] = "base"  # its line in Table 2; sp: base made wider, to Resona's size
    # the data
    corpus: dict[str, Any] | str  # as in a parameter file: a name, or a mapping with a name and options
    own_tokenizer: bool = False  # vocab_size tokens trained on the corpus, in the place of the corpus' tokenizer
    vocab_size: int = 50257
    augmentation: dict[str, Any] | None = None  # what extends the training articles: {"kind": "recap", ...}
    length: int  # inputs of a training sequence
    packed: bool = False  # articles one after the other, instead of windows of one article each
    # the training
    steps: int
    batch_size: int  # sequences a step, of all processes and accumulated steps together
    accumulation: int = 1  # parts that each process takes a step in
    learning_rate: float = 1e-3
    warmup: float = 0.05  # share of the steps over which the learning rate rises
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    bf16: bool = False  # autocast to bfloat16
    log_every: int = 10
    eval_every: int = 100  # steps from one validation, and checkpoint, to the next; the best one counts
    seed: int = 0  # of the initial weights and of the order of the sequences
    threads: int = 1  # of torch on a CPU; they change the order of sums, so they are part of the run

    def __post_init__(self) -> None:
        check_options(type(self), asdict(self), "LMRun")
        for name in ("steps", "batch_size", "accumulation", "log_every", "eval_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")
        if self.eval_every % self.log_every or self.steps % self.eval_every:
            raise ValueError(f"eval_every must be a multiple of log_every and steps one of eval_every, got steps="
                             f"{self.steps}, eval_every={self.eval_every}, log_every={self.log_every}")
        for name in ("learning_rate", "max_grad_norm", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above zero, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number, zero or above, got {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, 0 or more and below 1, got {self.warmup}")
        if (self.variant == "resona") != (self.resona is not None):
            raise ValueError(f"variant {self.variant!r} and resona={self.resona!r} do not go together")
        if self.chunks != "search" and self.resona is None:
            raise ValueError(f"chunks {self.chunks!r} are for a model with Resona layers; this one has none")
        self.to_model_config()
        if self.resona is not None:
            chunk_size = self.resona.get("chunk_size", accepted_options(Resona)["chunk_size"].default)
            if chunk_size >= self.length:
                raise ValueError(f"resona: chunk_size must be below length ({self.length}), got {chunk_size}: no chunk "
                                 "would lie wholly before any position")

    def to_model_config(self) -> RecurrentLMConfig:
        """The model of this run."""
        return RecurrentLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            mixer=self.mixer,
            mixer_args=self.mixer_args,
            layer_overrides=self.layer_overrides,
            mlp=self.mlp,
            intermediate_size=self.intermediate_size,
            tie_word_embeddings=self.tie_embeddings,
            initializer_range=self.initializer_range,
            resona=self.resona,
            use_cache=False,
        )


def run_lm(
    run: LMRun, progress: Callable[[dict[str, Any]], None] | None = None, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Train the model of `run` and score it; goes on from the last checkpoint of a process that was killed.

    Under torchrun or accelerate every process calls this, and all return the same. The weights of the validation with
    the smallest loss are those that are scored and kept (`lrm_recall.train.lm_checkpoints.trained_model`).

    Args:
        run: what to train.
        progress: called with each new entry of the history, in the main process.
        device: "cpu" or "cuda".

    Returns:
        metrics: of the chosen weights, on the validation and the test split: valid_loss and test_loss (nats a token),
            valid_ppl and test_ppl (by token), valid_word_ppl and test_word_ppl, test_positions (as
            `Perplexity.positions`); best_step, steps; tokens (trained on), parameters, state_size; tokens_per_s
            (without the first entry of the history, which compiles), flops_per_token, mfu (None where the peak of the
            device is not known). alone_loss and behind_loss: of the first window of each test article, nothing or the
            end of another article in front. With Resona also random_chunks_ppl (test_ppl when every layer reads random
            chunks) and retrieval (`lrm_recall.train.lm_retrieval.retrieval_map`). Where chunks were found before
            training, all scores are with those of the split, and search_ppl is test_ppl by the model's own search.
        history: every log_every steps step, loss, grad_norm, learning_rate, tokens, seconds; every eval_every steps
            step, valid_loss.
        runtime_s: wall-clock seconds of this process. peak_memory_mb: see `lrm_recall.train.memory`.

    Raises:
        DataError: the corpus cannot be had, or its tokenizer does not fit.
        ValueError: the batch cannot be divided among the processes.
        FloatingPointError: a loss is no finite number.
    """
    device, begin = torch.device(device), time.perf_counter()
    check_processes(run, device)
    reset_peak(device)
    prepared = prepared_corpus(run.corpus, run.vocab_size, run.own_tokenizer, run.augmentation)
    key, tokenizer = row_key(run, prepared), tokenizer_of(prepared)
    with torch_threads(run.threads, device), torch.random.fork_rng(devices=[]), no_bars():
        trainer = LMTrainer(run, initial_model(run), prepared, checkpoints_folder(key), device, progress)
        state = _train(run, trainer, checkpoints_folder(key))
        model = RecurrentLM.from_pretrained(checkpoint(checkpoints_folder(key), state.best_global_step))
        model.to(trainer.args.device)
        if trainer.is_world_process_zero():
            keep_model(model, tokenizer, key)
        entries = history(state.log_history)
        metrics = {
            "steps": run.steps,
            "best_step": state.best_global_step,
            **_speed(entries, model, trainer.args.world_size),
            **_scores(run, model, prepared, tokenizer.decode, trainer.finder),
        }
        trainer.accelerator.wait_for_everyone()  # a checkpoint may go once this has returned
    return {
        "metrics": metrics,
        "history": entries,
        "runtime_s": time.perf_counter() - begin,
        "peak_memory_mb": peak_mb(device),
    }


def code_modules(run: LMRun) -> list[str]:
    """Modules whose code, with all they import, decides the result of a run: the argument of `code_hash`."""
    retrieval = [] if run.resona is None else ["lrm_recall.resona.layer"]
    # how a corpus is made shows in its revision; where files lie, what counts only while decoding, and how the kernels
    # of a pass are launched, in nothing
    no_matter = ("checkpoints", "decode", "data.preparation", "data.corpora", "data.augment", "data.tokenizer",
                 "data.store", "train.lm_tokenizer", "train.lm_checkpoints", "train.lm_graph", "code_hash",
                 "rows")  # fmt: skip
    return ["lrm_recall.train.language_model", f"lrm_recall.mixers.{run.mixer}", *retrieval,
            *(f"-lrm_recall.{name}" for name in no_matter)]


def row_key(run: LMRun, prepared: Prepared) -> str:
    """The key of the row of a run on this corpus, as a sweep with `EXPERIMENT` gives it."""
    return run_key(EXPERIMENT, asdict(run), run.seed, prepared.revision, code_hash(code_modules(run)))


def initial_model(run: LMRun) -> RecurrentLM:
    """The model with the initial weights of this seed; draws from torch's global stream.

    With Resona, everything that the base model has starts as it does there: the two differ by what is compared alone.
    """
    torch.manual_seed(run.seed)
    model = RecurrentLM(run.to_model_config())
    if run.resona is None:
        return model
    torch.manual_seed(run.seed)
    alone = replace(run, variant="base", resona=None, chunks="search", layer_overrides={})
    base = RecurrentLM(alone.to_model_config())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, start in base.named_parameters():
            for layer in run.resona["layers"]:  # there Resona wraps the mixer
                name = name.replace(f".{layer}.mixer.", f".{layer}.mixer.mixer.")
            if name in parameters and parameters[name].shape == start.shape:  # Hymba's may have lost their attention
                parameters[name].copy_(start)
    return model


def _train(run: LMRun, trainer: LMTrainer, folder: Path) -> TrainerState:
    """Train, or go on training, until the checkpoint of the last step is there; the state that it holds."""
    with ExitStack() as stack:
        if trainer.is_world_process_zero():  # two notebooks may ask for one run: the second waits, and finds it done
            stack.enter_context(locked(folder))
            drop_incomplete(folder)
        trainer.accelerator.wait_for_everyone()
        done = last_step(folder)
        if done < run.steps:
            trainer.train(resume_from_checkpoint=str(checkpoint(folder, done)) if done else None)
        trainer.accelerator.wait_for_everyone()
    return TrainerState.load_from_json(str(checkpoint(folder, run.steps) / "trainer_state.json"))


def _speed(entries: list[dict[str, Any]], model: RecurrentLM, processes: int) -> dict[str, Any]:
    logged = [entry for entry in entries if "loss" in entry]
    steady = logged[1:] or logged
    tokens_per_s = sum(entry["tokens"] for entry in steady) / sum(entry["seconds"] for entry in steady)
    return {
        "tokens": sum(entry["tokens"] for entry in logged),
        "tokens_per_s": tokens_per_s,
        "flops_per_token": flops_per_token(model),
        "mfu": utilisation(model, tokens_per_s, processes),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _scores(
    run: LMRun, model: RecurrentLM, prepared: Prepared, decode: Callable[..., str], finder: ChunkFinder | None
) -> dict[str, Any]:
    def score(split: str = "test", **options: Any) -> Perplexity:
        return perplexity(model, prepared, split, run.length, batch_size=run.batch_size, bf16=run.bf16,
                          **{"finder": finder, **options})

    valid, test = score("validation"), score()
    scores: dict[str, Any] = {"test_positions": test.positions, "state_size": model.state_size(run.length)}
    for name, scored in (("valid", valid), ("test", test)):
        scores |= {f"{name}_loss": scored.loss, f"{name}_ppl": scored.by_token, f"{name}_word_ppl": scored.by_word}
    scores |= {"alone_loss": score(behind=0).loss, "behind_loss": score(behind=_BEHIND).loss}
    if run.resona is not None:
        length = min(run.length, _MAP_CHUNKS * model.model.layers[run.resona["layers"][0]].mixer.chunk_size)
        scores["random_chunks_ppl"] = score(chunks="random").by_token
        if finder is not None:
            scores["search_ppl"] = score(finder=None).by_token
        scores["retrieval"] = retrieval_map(model, prepared, decode, length=length)
    return scores
