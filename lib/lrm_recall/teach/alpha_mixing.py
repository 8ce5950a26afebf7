"""A tiny recurrent model that has learned to recall, and the same model with retrieval mixed in (Resona, section 3).

    y = alpha * mixer(x) + (1 - alpha) * retrieved(x)

First one Mamba2 layer learns MQAR alone. Then Resona is put around it and only Resona's own parameters are trained,
so the mixer's branch stays what it was: alpha = 1 is the trained base model, and what the slider adds is retrieval.
(In the paper both branches of such small models are trained together; `train_together` does that too.)

Symbols
    B  batch    T  positions    V  vocabulary    N  chunks    U  chunk_size    k  top_k    P  key-value pairs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.config import RecurrentLMConfig
from lrm_recall.model import RecurrentLM
from lrm_recall.resona.layer import Resona
from lrm_recall.resona.search import search, visible_chunks
from lrm_recall.tasks.mqar import IGNORE, MQARData, accuracy, mqar

VOCABULARY, LENGTH, HIDDEN = 128, 64, 32
_BASE = "layers.0.mixer."
_TRAINED_PAIRS = (4, 8, 16)  # key-value pairs of the training examples, by turns
_BATCH, _RATE = 64, 1e-2


def examples(num_kv_pairs: int, num_examples: int, seed: int, length: int = LENGTH) -> MQARData:
    """MQAR over this module's vocabulary: inputs and labels [num_examples, length]."""
    return mqar(vocab_size=VOCABULARY, num_examples=num_examples, input_length=length, num_kv_pairs=num_kv_pairs,
                seed=seed, generator="fast")


def build(alpha: float | Literal["learned"] | None, seed: int = 0) -> RecurrentLM:
    """One Mamba2 layer with a state of 2 x 32 x 16 numbers, with Resona around it unless alpha is None."""
    resona = {"layers": [0], "chunk_size": 2, "top_k": 1, "encoder": "place", "alpha": alpha}
    config = RecurrentLMConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, mixer="mamba2",
        mixer_args={"state_size": 16, "head_dim": 32}, mlp="none", norm="layernorm", tie_word_embeddings=True,
        embedding_range=0.1, use_cache=False, resona=None if alpha is None else resona)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.default_generator.manual_seed(seed)
        return RecurrentLM(config)


def train_base(steps: int, seed: int = 0) -> RecurrentLM:
    """The recurrent model alone, trained from scratch."""
    return _train(build(None, seed), steps, seed)


def train_together(steps: int, alpha: float = 0.5, seed: int = 0) -> RecurrentLM:
    """Mixer and retrieval trained from scratch, side by side, at one alpha."""
    return _train(build(alpha, seed), steps, seed)


def add_retrieval(base: RecurrentLM, alpha: float | Literal["learned"], steps: int, seed: int = 0) -> RecurrentLM:
    """A copy of a trained base model with Resona around its mixer; only what Resona adds is trained."""
    model = build(alpha, seed)
    frozen = {name.replace(_BASE, f"{_BASE}mixer."): tensor for name, tensor in base.state_dict().items()}
    model.load_state_dict(frozen, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return _train(model, steps, seed)


def without_retrieval(model: RecurrentLM) -> RecurrentLM:
    """The base model inside a model with Resona: the same weights, and no retrieval code at all."""
    base = build(None)
    inner = {name.replace(f"{_BASE}mixer.", _BASE): tensor for name, tensor in model.state_dict().items()}
    base.load_state_dict({name: inner[name] for name in base.state_dict()})
    return base.eval()


def resona_layer(model: RecurrentLM) -> Resona:
    """The Resona around the only mixer; ValueError for a model without."""
    layer = model.model.layers[0].mixer
    if not isinstance(layer, Resona):
        raise ValueError(f"the model has no Resona around its {type(layer).__name__}; use add_retrieval")
    return layer


@contextmanager
def at_alpha(model: RecurrentLM, alpha: float) -> Iterator[RecurrentLM]:
    """Within the block the model mixes with this alpha; ValueError when it is outside [0, 1]."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    layer = resona_layer(model)
    before, layer.alpha = layer.alpha, alpha
    try:
        yield model
    finally:
        layer.alpha = before


@torch.no_grad()
def recall(model: RecurrentLM, data: MQARData, chunk_indices: Tensor | None = None) -> float:
    """Accuracy per labelled position; `chunk_indices` [B, T, k] replace the model's own search."""
    logits = model(data.inputs, use_cache=False, chunk_indices=chunk_indices).logits  # [B, T, V]
    return accuracy(logits.argmax(dim=-1), data.labels).position


def recall_by_alpha(model: RecurrentLM, alphas: Sequence[float], pairs: Sequence[int], num_examples: int = 200,
                    seed: int = 2**31) -> np.ndarray:
    """Accuracy at each alpha for each number of pairs, on examples that training has not seen: [alphas, pairs]."""
    table = np.empty((len(alphas), len(pairs)))
    for column, number in enumerate(pairs):
        data = examples(number, num_examples, seed + number)
        for row, alpha in enumerate(alphas):
            with at_alpha(model, alpha):
                table[row, column] = recall(model, data)
    return table


@dataclass(frozen=True)
class Trace:
    """What one Resona layer does with one sequence, position by position.

    Attributes:
        tokens: [T] ids; asked: [T] whether the position is scored.
        cosines: [T, N] of each position with each chunk; chosen: [T] the chunk picked, -1 for none (k is 1).
        weights: [T] the gate of the chosen chunk; the null chunk has the rest.
        mixed, retrieved: [T] norms of both branches' outputs, before alpha weighs them.
        alpha: [T] the weight of the mixer's own output.
        chunk_size: U.
    """

    tokens: np.ndarray
    asked: np.ndarray
    cosines: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    mixed: np.ndarray
    retrieved: np.ndarray
    alpha: np.ndarray
    chunk_size: int


@torch.no_grad()
def trace(model: RecurrentLM, data: MQARData) -> list[Trace]:
    """Look into the Resona layer of a model of this module, one `Trace` for each sequence."""
    layer, seen = resona_layer(model), {}
    hooks = [layer.mixer.register_forward_hook(lambda module, given, out: seen.update(x=given[0], mixed=out)),
             layer.o_proj.register_forward_hook(lambda module, given, out: seen.update(retrieved=out))]
    try:
        model(data.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    queries, chunks = _search_space(model, data.inputs)
    found = layer.retrieve(seen["x"], memory=model.model.embeddings(data.inputs))
    learned = layer.alpha == "learned"
    alpha = layer.alpha_proj(seen["x"]).sigmoid()[..., 0] if learned else torch.full(queries.shape[:2], layer.alpha)
    columns = (data.inputs, data.labels != IGNORE, queries @ chunks.transpose(1, 2), found.indices[..., 0],
               found.weights[..., 0], seen["mixed"].norm(dim=-1), seen["retrieved"].norm(dim=-1), alpha)
    return [Trace(*(column[row].numpy() for column in columns), layer.chunk_size) for row in range(len(data.inputs))]


@torch.no_grad()
def shuffled_chunks(model: RecurrentLM, inputs: Tensor, seed: int = 0) -> Tensor:
    """What the search finds when the chunks' embeddings are dealt out anew, none to its own chunk: [B, T, 1].

    Args:
        inputs: [B, T] token ids.
    """
    queries, chunks = _search_space(model, inputs)
    order = torch.randperm(chunks.shape[1], generator=torch.Generator().manual_seed(seed))  # [N]
    source = torch.empty_like(order)
    source[order] = order.roll(1)  # one cycle through all chunks, so none keeps its own embedding
    visible = visible_chunks(torch.arange(inputs.shape[1])[None], resona_layer(model).chunk_size)  # [1, T]
    return search(queries, chunks[:, source], visible, 1)


def role_of(trace: Trace, num_kv_pairs: int) -> list[str]:
    """Each position's part in MQAR: key, value, query or filler."""
    first = ["key", "value"] * num_kv_pairs
    return first + ["query" if asked else "filler" for asked in trace.asked[len(first):]]


def _search_space(model: RecurrentLM, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, T, E] and chunk embeddings [B, N, E] of the layer, both of unit length."""
    layer, embedded = resona_layer(model), model.model.embeddings(inputs)  # [B, T, D]
    whole = inputs.shape[1] // layer.chunk_size * layer.chunk_size  # tokens in complete chunks
    memory = layer.memory_norm(embedded[:, :whole]).unflatten(1, (-1, layer.chunk_size))  # [B, N, U, D]
    return layer.encoder.queries(model.model.layers[0].mixer_norm(embedded)), layer.encoder.chunks(memory)


def _train(model: RecurrentLM, steps: int, seed: int) -> RecurrentLM:
    """AdamW on examples of several numbers of pairs; the rate rises over a tenth and falls over the second half."""
    sets = [examples(pairs, 4000, seed + pairs) for pairs in _TRAINED_PAIRS]
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.01, fused=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1, 10 * step / steps, 2 * (1 - step / steps))
        data = sets[step % len(sets)]
        rows = torch.randint(len(data.inputs), (_BATCH,), generator=generator)
        inputs, labels = data.inputs[rows], data.labels[rows]  # [B, T]
        hidden = model.model(inputs, use_cache=False).last_hidden_state[labels != IGNORE]  # [B * P, D]
        loss = F.cross_entropy(model.lm_head(hidden), labels[labels != IGNORE])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model.eval()
