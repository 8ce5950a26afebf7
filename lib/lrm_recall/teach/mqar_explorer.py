"""A tiny MQAR model with Resona whose alpha, chunk_size and top_k are changed after training, on the same weights.

It is trained as the models of notebook 01 are (`MQARRun` and `fit`), mixer and retrieval together, but always on the
CPU and in seconds. Chunks are embedded by their mean, the one encoder without weights for each place in a chunk:
these weights then work at every chunk size.

Symbols
    N  examples    T  positions    P  key-value pairs, and questions    U  chunk_size    k  top_k
    A, C, K  how many alphas, chunk sizes and top_ks are tried
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lrm_recall.model import RecurrentLM
from lrm_recall.resona.layer import Resona, Retrieval
from lrm_recall.resona.search import MeanEncoder
from lrm_recall.resona.watch import watched
from lrm_recall.tasks.mqar import accuracy
from lrm_recall.teach.alpha_mixing import at_alpha, resona_layer
from lrm_recall.train.batches import Split
from lrm_recall.train.loop import fit, logits_of_questions
from lrm_recall.train.small import check_chunk_size
from lrm_recall.train.start import initial_model, torch_threads
from lrm_recall.train.synthetic import MQARRun, mqar_splits

Array = TypeVar("Array", np.ndarray, Tensor)

ALPHAS = tuple(tenth / 10 for tenth in range(11))
CHUNK_SIZES = (1, 2, 3, 4, 6, 8)
TOP_KS = (1, 2, 3, 4)


class Knobs(NamedTuple):
    """What can be changed on trained weights."""

    alpha: float
    chunk_size: int
    top_k: int


TRAINED = Knobs(alpha=0.5, chunk_size=2, top_k=1)  # the last two are the paper's for MQAR (appendix A.3)


@dataclass(frozen=True)
class Example:
    """One sequence, its questions in the order in which they are asked.

    Attributes:
        tokens: [T] ids; positions: [P] where the questions stand; pairs: [P] which pair each asks for: its key is
            token 2 * pair, its value the token behind it.
        right: [A, C, K, P] whether the question is answered right.
        chosen: for each chunk size and top_k, [P, k] the chunks that the question looks into, -1 for none.
        weights: as `chosen`, the gate's weight of each; the null chunk has the rest.
    """

    tokens: np.ndarray
    positions: np.ndarray
    pairs: np.ndarray
    right: np.ndarray
    chosen: dict[tuple[int, int], np.ndarray]
    weights: dict[tuple[int, int], np.ndarray]


@dataclass(frozen=True)
class Explored:
    """What every setting of the knobs gives on questions that training has not seen.

    Attributes:
        alphas, chunk_sizes, top_ks: the values tried; trained: those of training.
        accuracy: [A, C, K] share of the questions that are answered right.
        found: [C, K] share of the questions that look into a chunk which holds their answer; alpha has no part in it.
        best_weight: [C, K] what the gate gives the best chunk, on average.
        alone: accuracy of the same model trained without Resona for as long.
        guessing: accuracy of naming any of the values that the sequence lists.
        example: one of the sequences.
    """

    alphas: tuple[float, ...]
    chunk_sizes: tuple[int, ...]
    top_ks: tuple[int, ...]
    trained: Knobs
    accuracy: np.ndarray
    found: np.ndarray
    best_weight: np.ndarray
    alone: float
    guessing: float
    example: Example

    def index(self, knobs: Knobs) -> tuple[int, int, int]:
        """Where a setting stands in `accuracy`; ValueError for one that was not tried."""
        alpha = next((i for i, tried in enumerate(self.alphas) if abs(tried - knobs.alpha) < 1e-6), None)
        if alpha is None:
            raise ValueError(f"alpha must be one of {_listed(self.alphas)}, got {knobs.alpha!r}")
        for name, tried in (("chunk_size", self.chunk_sizes), ("top_k", self.top_ks)):
            if getattr(knobs, name) not in tried:
                raise ValueError(f"{name} must be one of {_listed(tried)}, got {getattr(knobs, name)!r}")
        return alpha, self.chunk_sizes.index(knobs.chunk_size), self.top_ks.index(knobs.top_k)


def tiny_run(max_epochs: int, num_train: int = 8000, seed: int = 0, *, retrieves: bool = True) -> MQARRun:
    """One Mamba2 layer, alone or with Resona at the settings of `TRAINED`, on sequences of 8 pairs.

    Raises:
        ValueError: a number below 1, or a seed out of range.
    """
    resona = {"layers": [0], **TRAINED._asdict(), "encoder": "mean"}
    return MQARRun(mixer="mamba2", mixer_args={"state_size": 16, "head_dim": 32}, d_model=32, num_layers=1,
                   embedding_range=0.1, resona=resona if retrieves else None, vocab_size=128, input_length=48,
                   num_kv_pairs=8, generator="fast", num_train=num_train, num_valid=100, num_test=100,
                   learning_rate=1e-2, max_epochs=max_epochs, target_accuracy=None, seed=seed)  # fmt: skip


def train_tiny(run: MQARRun) -> RecurrentLM:
    """The model of a run, trained from scratch on one core of the CPU."""
    model = initial_model(run.to_model_config(), run.seed)
    with torch_threads(1, torch.device("cpu")):
        fit(run.to_fit_settings(), model, mqar_splits(run), logits_of_questions, _share_right)
    return model.eval()


def answer_chunks(pairs: Array, chunk_size: int) -> Array:
    """The chunk that holds the value of each pair; any shape."""
    return (2 * pairs + 1) // chunk_size


@contextmanager
def at_knobs(model: RecurrentLM, knobs: Knobs) -> Iterator[Resona]:
    """Within the block the model's Resona has these settings; no weight changes. Yields that layer.

    Raises:
        ValueError: a value out of its range, or weights that cannot have it: an alpha to be learned, or other chunks
            for an encoder with weights for each place in a chunk. The model is then as it was.
    """
    layer = resona_layer(model)
    Resona.check_options(layer.hidden_size, knobs._asdict())
    if knobs.alpha == "learned":
        raise ValueError("alpha must be a number in [0, 1] here, got 'learned': that takes weights of its own")
    if knobs.chunk_size != layer.chunk_size and type(layer.encoder) is not MeanEncoder:
        raise ValueError(f"chunk_size must stay {layer.chunk_size}, got {knobs.chunk_size}: the model was trained with "
                         "weights for each place in a chunk; encoder 'mean' has none")
    before = layer.chunk_size, layer.top_k
    layer.chunk_size, layer.top_k = knobs.chunk_size, knobs.top_k
    try:
        with at_alpha(model, knobs.alpha):
            yield layer
    finally:
        layer.chunk_size, layer.top_k = before


def turn_knobs(
    model: RecurrentLM,
    alone: RecurrentLM,
    run: MQARRun,
    alphas: Sequence[float] = ALPHAS,
    chunk_sizes: Sequence[int] = CHUNK_SIZES,
    top_ks: Sequence[int] = TOP_KS,
) -> Explored:
    """Every setting of a trained model on the test questions of its run.

    Args:
        model: trained by `train_tiny(run)`; alone: the same without Resona.

    Raises:
        ValueError: a setting that cannot be, before any is tried.
    """
    for name, tried in zip(Knobs._fields, (alphas, chunk_sizes, top_ks), strict=True):
        for value in tried:
            with at_knobs(model, TRAINED._replace(**{name: value})) as layer:
                check_chunk_size({"chunk_size": layer.chunk_size}, run.input_length)
    test = mqar_splits(run).test
    values = test.inputs[:, 1 : 2 * run.num_kv_pairs : 2]  # [N, P], in the order of the pairs
    pairs = (values[:, None] == test.answers[..., None]).int().argmax(-1)  # [N, P], in the order of the questions
    shape = (len(alphas), len(chunk_sizes), len(top_ks))
    table, right = np.empty(shape), np.empty((*shape, run.num_kv_pairs), dtype=bool)
    found, best_weight = np.empty(shape[1:]), np.empty(shape[1:])
    chosen, weights = {}, {}
    with torch_threads(1, torch.device("cpu")):
        for c, chunk_size in enumerate(chunk_sizes):
            for k, top_k in enumerate(top_ks):
                looked = _looked(model, test, Knobs(TRAINED.alpha, chunk_size, top_k))
                holds = looked.indices == answer_chunks(pairs, chunk_size)[..., None]  # [N, P, k]
                found[c, k] = holds.any(-1).float().mean()
                best_weight[c, k] = looked.weights[..., 0].mean()
                chosen[chunk_size, top_k], weights[chunk_size, top_k] = (
                    tensor[0].numpy() for tensor in (looked.indices, looked.weights))
                for a, alpha in enumerate(alphas):
                    with at_knobs(model, Knobs(alpha, chunk_size, top_k)):
                        answers = _answers(model, test)  # [N, P]
                    table[a, c, k] = _share_right(answers, test.answers)
                    right[a, c, k] = answers[0] == test.answers[0]
        reached = _share_right(_answers(alone, test), test.answers)
    example = Example(test.inputs[0].numpy(), test.positions[0].numpy(), pairs[0].numpy(), right, chosen, weights)
    return Explored(tuple(alphas), tuple(chunk_sizes), tuple(top_ks), TRAINED, table, found, best_weight, reached,
                    1 / run.num_kv_pairs, example)


@torch.no_grad()
def _looked(model: RecurrentLM, test: Split, knobs: Knobs) -> Retrieval:
    """What the questions alone retrieve: indices and weights [N, P, k]."""
    with at_knobs(model, knobs) as layer, watched({0: layer}) as seen:
        logits_of_questions(model, test)
    rows = torch.arange(len(test.inputs))[:, None]  # [N, 1]
    return Retrieval(*(tensor[rows, test.positions] for tensor in (seen[0].indices, seen[0].scores, seen[0].weights)))


@torch.no_grad()
def _answers(model: RecurrentLM, test: Split) -> Tensor:
    """Predicted values [N, P]."""
    return logits_of_questions(model, test).argmax(-1).view_as(test.answers)


def _share_right(predictions: Tensor, answers: Tensor) -> float:
    return accuracy(predictions, answers).position


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
