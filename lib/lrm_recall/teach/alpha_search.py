"""Search and causality without training: a sentence cut into chunks, and which token can reach which output.

Words get random vectors, so a query finds a chunk only because a word of it occurs there: search by identity, with
nothing learned. Symbols as in `lrm_recall.resona.layer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lrm_recall.resona.layer import Resona

SENTENCE = ("Anna keeps her bike in Utrecht . Boris keeps his boat in Ghent . It rained all week . "
            "Where is the bike ? Anna said it is in")
_HIDDEN = 256  # random vectors of this many channels are nearly orthogonal


@dataclass(frozen=True)
class Search:
    """Which chunk each word picks: words [T], cosines [T, N], chosen [T] (-1 for none), and the chunk size."""

    words: tuple[str, ...]
    cosines: np.ndarray
    chosen: np.ndarray
    chunk_size: int


@torch.no_grad()
def search_sentence(sentence: str = SENTENCE, chunk_size: int = 3, seed: int = 0) -> Search:
    """Search a sentence of words and spaces with an untrained Resona layer.

    Raises:
        ValueError: the sentence has no whole chunk.
    """
    words = tuple(sentence.split())
    if not 1 <= chunk_size <= len(words):
        raise ValueError(f"chunk_size must be from 1 to the {len(words)} words of the sentence, got {chunk_size}")
    vectors = _word_vectors(words, seed)  # [1, T, D]
    layer = Resona(nn.Identity(), _HIDDEN, chunk_size=chunk_size, encoder="mean", memory_norm=False)
    whole = len(words) // chunk_size * chunk_size
    chunks = layer.encoder.chunks(vectors[:, :whole].unflatten(1, (-1, chunk_size)))  # [1, N, D]
    cosines = layer.encoder.queries(vectors) @ chunks.transpose(1, 2)  # [1, T, N]
    return Search(words, cosines[0].numpy(), layer.retrieve(vectors).indices[0, :, 0].numpy(), chunk_size)


@torch.no_grad()
def influence(length: int = 16, chunk_size: int = 4, seed: int = 0) -> np.ndarray:
    """How far each output moves when one token of the memory is replaced: [outputs, tokens], relative to the largest.

    Every visible chunk is read (top_k = N), and the mixer beside it is the identity, whose input stays as it is: what
    moves has come through retrieval. Where a token cannot reach an output the number is 0.0 exactly.
    """
    if not 1 <= chunk_size < length:
        raise ValueError(f"chunk_size must be at least 1 and below the length {length}, got {chunk_size}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layer = Resona(nn.Identity(), 32, chunk_size=chunk_size, top_k=length // chunk_size, encoder="mean")
        x, other = torch.randn(2, 1, length, 32)  # each [1, T, D]
    changed = torch.where(torch.eye(length, dtype=torch.bool)[..., None], other, x)  # [T, T, D]: row j has token j new
    moved = layer(x.expand(length, -1, -1), memory=changed) - layer(x, memory=x)  # [T tokens, T outputs, D]
    distance = moved.norm(dim=-1).T  # [outputs, tokens]
    return (distance / distance.max()).numpy()


def _word_vectors(words: tuple[str, ...], seed: int) -> Tensor:
    """A random vector for each different word: [1, T, D]."""
    names = list(dict.fromkeys(words))
    table = torch.randn(len(names), _HIDDEN, generator=torch.Generator().manual_seed(seed))
    return table[[names.index(word) for word in words]][None]
