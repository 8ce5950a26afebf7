"""Tiny models that learn to recall pairs, and what merging the heads of a trained one costs and gives.

Every position of the task shows one key together with its value (the sum of their embeddings); then every key is asked
for, once, in random order. So a model need not learn to compare neighbours, as in MQAR: what is measured is how many
pairs its state can hold. One GLA layer is enough, and a run takes seconds on one core.

    B batch, N pairs, T = 2 N positions, D hidden size, H heads
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.model import RecurrentLM
from lrm_recall.options import check_options
from lrm_recall.statex.surgery import merge_heads
from lrm_recall.teach.partly_merged import INGREDIENTS, output_change, with_ingredients

ARMS = ("keep", "inherit", "reinitialise")  # how a trained model goes on: as it is, or merged, from either start


@dataclass(frozen=True, kw_only=True)
class MergeRun:
    """Everything that decides the outcome of `run_merging`; plain JSON through `dataclasses.asdict`.

    Raises:
        ValueError: a wrong type, or a number out of range.
    """

    hidden_size: int = 32
    heads: list[int] = field(default_factory=lambda: [4, 2, 1])  # models trained from scratch; the first is merged
    num_keys: int = 32
    num_values: int = 64
    num_pairs: int = 16  # in training
    steps: int = 1000  # from scratch
    more_steps: int = 500  # after the surgery, of every arm
    batch_size: int = 64
    learning_rate: float = 1.0e-2
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(type(self), asdict(self), "MergeRun")
        for name in ("hidden_size", "num_keys", "num_values", "num_pairs", "steps", "more_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_pairs > self.num_keys:
            raise ValueError(f"num_pairs must be at most num_keys ({self.num_keys}), got {self.num_pairs}")
        if not self.heads:
            raise ValueError("heads must name at least one model, got an empty list")


class Batch(NamedTuple):
    """Token ids: keys and values [B, N] as they are shown; asked and answers [B, N], the keys in another order."""

    keys: Tensor
    values: Tensor
    asked: Tensor
    answers: Tensor


def draw(run: MergeRun, num_pairs: int, generator: torch.Generator, batch_size: int | None = None) -> Batch:
    """A batch; keys do not repeat within a row, values may."""
    rows = batch_size or run.batch_size
    keys = torch.rand(rows, run.num_keys, generator=generator).argsort(1)[:, :num_pairs]  # [B, N]
    values = torch.randint(run.num_values, (rows, num_pairs), generator=generator) + run.num_keys
    order = torch.rand(rows, num_pairs, generator=generator).argsort(1)
    return Batch(keys, values, keys.gather(1, order), values.gather(1, order))


def new_model(run: MergeRun, num_heads: int) -> RecurrentLM:
    """One GLA layer and its feed-forward block, initialised with the run's seed; torch's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return RecurrentLM(RecurrentLMConfig(
            vocab_size=run.num_keys + run.num_values, hidden_size=run.hidden_size, num_hidden_layers=1, mixer="gla",
            mixer_args={"num_heads": num_heads}, intermediate_size=2 * run.hidden_size, initializer_range=0.1,
            use_cache=False,
        ))


def inputs(model: RecurrentLM, batch: Batch) -> Tensor:
    """What the first layer sees: [B, 2 N, D], pairs, then questions."""
    embed = model.model.embeddings
    return torch.cat((embed(batch.keys) + embed(batch.values), embed(batch.asked)), dim=1)


def logits(model: RecurrentLM, batch: Batch) -> Tensor:
    """[B, N, vocabulary], at the questions alone."""
    hidden = model.model(inputs_embeds=inputs(model, batch), use_cache=False).last_hidden_state  # [B, 2 N, D]
    return model.lm_head(hidden[:, batch.keys.shape[1] :])


@torch.no_grad()
def recall(model: RecurrentLM, run: MergeRun, num_pairs: int, rows: int = 256) -> float:
    """Share of questions answered right, on pairs that training has not seen."""
    batch = draw(run, num_pairs, torch.Generator().manual_seed(run.seed + 10_000), rows)
    return (logits(model, batch).argmax(-1) == batch.answers).float().mean().item()


def train(model: RecurrentLM, run: MergeRun, steps: int, *, stage: int) -> Iterator[int]:
    """Train in place; yields the number of steps done before every step and after the last one.

    AdamW, gradients clipped to norm 1, the rate rises over 50 steps and falls to zero in a straight line.

    Args:
        stage: 0 from scratch, 1 after the surgery: the two see different data.
    """
    generator = torch.Generator().manual_seed(2 * run.seed + stage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.01, fused=True)
    for step in range(steps):
        yield step
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * min(1.0, (step + 1) / 50) * (1 - step / steps)
        batch = draw(run, run.num_pairs, generator)
        loss = F.cross_entropy(logits(model, batch).flatten(0, 1), batch.answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    yield steps


def pretrain(run: MergeRun, num_heads: int) -> RecurrentLM:
    """A model of that many heads, trained from scratch."""
    model = new_model(run, num_heads)
    for _ in train(model, run, run.steps, stage=0):
        pass
    return model


def start_arm(model: RecurrentLM, arm: str, seed: int) -> RecurrentLM:
    """The trained model as one arm begins; `model` is left as it is, torch's random state too.

    Raises:
        ValueError: an unknown arm.
    """
    if arm == "keep":
        return copy.deepcopy(model)
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return merge_heads(model, [0], start=arm)


def pair_counts(run: MergeRun) -> list[int]:
    """Numbers of pairs at which recall is measured: 1, 2, 4, 6, ... up to all keys."""
    return [1, *range(2, run.num_keys + 1, 2)]


def run_merging(run: MergeRun) -> dict[str, Any]:
    """Train a model for every number of heads, then go on with the first in three ways.

    Returns:
        metrics: parameters and state elements of each model, by heads ("parameters_4", "state_4").
        history: entries {"curve": "pairs", "name", "pairs", "accuracy"} of every finished model, named by its heads
            or its arm; {"curve": "steps", "name", "step", "accuracy"} of the arms at the training length; and
            {"curve": "ingredients", "name", "change", "accuracy"} of the first model, not trained on.
        runtime_s.

    Raises:
        RuntimeError: an accuracy that is no number.
    """
    begin = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower on two
    try:
        metrics, history = _train_all(run)
    finally:
        torch.set_num_threads(threads)
    for entry in history:
        if not math.isfinite(entry["accuracy"]):
            raise RuntimeError(f"an accuracy is no number: {entry}")
    return {"metrics": metrics, "history": history, "runtime_s": time.perf_counter() - begin}


def code_modules(run: MergeRun) -> list[str]:
    """Modules whose code decides the result: the argument of `code_hash`."""
    return [__name__, "lrm_recall.mixers.gla"]


def _train_all(run: MergeRun) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics and history of `run_merging`."""
    history: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    models = {str(heads): pretrain(run, heads) for heads in run.heads}
    for name, model in models.items():
        metrics |= {f"parameters_{name}": sum(p.numel() for p in model.parameters()),
                    f"state_{name}": model.state_size()}
        history += _by_pairs(run, name, model)
    history += _by_ingredient(run, models[str(run.heads[0])])
    for arm in ARMS:
        model = start_arm(models[str(run.heads[0])], arm, run.seed)
        for step in train(model, run, run.more_steps, stage=1):
            if step % max(1, run.more_steps // 10) == 0 or step == run.more_steps:
                history.append({"curve": "steps", "name": arm, "step": step,
                                "accuracy": recall(model, run, run.num_pairs)})
        history += _by_pairs(run, arm, model)
    return metrics, history


def _by_pairs(run: MergeRun, name: str, model: RecurrentLM) -> list[dict[str, Any]]:
    return [{"curve": "pairs", "name": name, "pairs": pairs, "accuracy": recall(model, run, pairs)}
            for pairs in pair_counts(run)]


def _by_ingredient(run: MergeRun, model: RecurrentLM) -> list[dict[str, Any]]:
    seen = inputs(model, draw(run, run.num_pairs, torch.Generator().manual_seed(run.seed + 20_000)))
    choices = {"none (identity)": (), **{name: (name,) for name in INGREDIENTS}, "all three": INGREDIENTS}
    return [{"curve": "ingredients", "name": name, "change": output_change(model, seen, chosen),
             "accuracy": recall(with_ingredients(model, chosen), run, run.num_pairs)}
            for name, chosen in choices.items()]
