"""Frozen encoders that score the chunks of a sequence for each of its positions, without a model that is trained.

    T positions, U chunk_size, N = T // U chunks, V vocabulary, D width of a table, w window

A position asks with its last w tokens, itself included: what a causal model has just read.

tf_idf          (default) chunks and questions are bags of tokens, weighed by how few articles of the training split
                hold each; a position whose tokens no chunk holds asks in vain. No parameters, the same for every model
                and seed, and what is rare (names, numbers: what a state forgets) decides.
mean_embedding  chunks and questions are means of the rows of a table, such as the embeddings of a trained model. With
                w = 1 and the model's own embeddings it is what its first layer searches for before any training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lrm_recall.data.errors import DataError
from lrm_recall.data.prepared import Prepared


class Encoder(Protocol):
    """Scores chunks."""

    def identity(self) -> dict[str, Any]:
        """All that decides the scores."""
        ...

    def scores(self, ids: Tensor, chunk_size: int) -> Tensor:
        """Ids [T] to scores [T, N] of every chunk, those of the future included; -inf where nothing is in common."""
        ...


class TfIdf:
    """Cosine of bags of tokens, up to the length of the question, which changes no order.

    Args:
        idf: [V] float32, weight of each token, 0 or more.
        window: w.
    """

    def __init__(self, idf: Tensor, window: int = 16) -> None:
        _check_window(window)
        self.idf, self.window = idf, window

    def identity(self) -> dict[str, Any]:
        return {"kind": "tf_idf", "idf": _digest(self.idf), "window": self.window}

    def scores(self, ids: Tensor, chunk_size: int) -> Tensor:
        num_chunks = len(ids) // chunk_size
        tokens, places = ids.unique(return_inverse=True)  # [M] distinct ones, [T]
        idf = self.idf[tokens]  # [M]
        bags = torch.zeros(num_chunks, len(tokens))  # [N, M]
        chunks = places[: num_chunks * chunk_size].view(num_chunks, chunk_size)  # [N, U]
        bags.scatter_add_(1, chunks, idf[chunks])
        bags = F.normalize(bags, dim=-1)
        each = (bags * idf).T[places]  # [N, M] -> [T, N]: what a token adds to the score of each chunk
        scores = _window_sum(each, self.window)
        return scores.masked_fill(scores == 0, -torch.inf)


class MeanEmbedding:
    """Cosine of means of rows of a table.

    Args:
        table: [V, D] float32.
        window: w.
        unit_rows: bring every row to the same length first, as Resona's `memory_norm` does before it is trained.
    """

    def __init__(self, table: Tensor, window: int = 1, *, unit_rows: bool = True) -> None:
        _check_window(window)
        self.window, self.unit_rows = window, unit_rows
        self.table = F.normalize(table.detach().float(), dim=-1) if unit_rows else table.detach().float()

    def identity(self) -> dict[str, Any]:
        return {"kind": "mean_embedding", "table": _digest(self.table), "window": self.window}

    def scores(self, ids: Tensor, chunk_size: int) -> Tensor:
        rows, num_chunks = self.table[ids], len(ids) // chunk_size  # [T, D]
        chunks = rows[: num_chunks * chunk_size].view(num_chunks, chunk_size, -1).mean(dim=1)  # [N, D]
        queries = _window_sum(rows, self.window)  # [T, D]
        return F.normalize(queries, dim=-1) @ F.normalize(chunks, dim=-1).T  # [T, N]


def tf_idf(prepared: Prepared, *, window: int = 16) -> TfIdf:
    """The encoder whose weights are counted in the training split of a corpus.

    A token that every article holds weighs nothing; one that none holds weighs most. The separator, which every
    article ends with, counts as one that all hold.

    Raises:
        DataError: a window below 1.
    """
    rows = prepared.splits["train"].select_columns("input_ids").with_format("numpy")
    holding = np.zeros(prepared.vocab_size)  # [V] articles that hold each token
    for ids in _columns(rows):
        holding[np.unique(ids)] += 1
    if prepared.separator is not None:
        holding[prepared.separator] = len(rows)
    idf = np.log((1 + len(rows)) / (1 + holding))  # [V]
    return TfIdf(torch.from_numpy(idf.astype(np.float32)), window)


def _columns(rows: Any) -> Iterable[np.ndarray]:
    for batch in rows.iter(1000):
        yield from batch["input_ids"]


def _window_sum(values: Tensor, window: int) -> Tensor:
    """Sum of each row of values [T, ...] and the window - 1 before it: [T, ...]."""
    if window == 1:
        return values
    padded = F.pad(values, (0, 0, window - 1, 0))  # [window - 1 + T, ...]
    return padded.unfold(0, window, 1).sum(dim=-1)


def _check_window(window: int) -> None:
    if window < 1:
        raise DataError(f"window must be at least 1, got {window}")


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
