"""The memory that Resona searches: the initial embeddings of every token so far, by position in the token's own row.

Row positions count from the first real token, so left padding is invisible here: position p of row b stands in
column `p + offset[b]`. Columns past the end of a row repeat the last one; no causal search ever asks for them.

B batch, L columns so far (padding included), D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Memory(ABC):
    """Initial embeddings [B, L, D], held as they are or recomputed from token ids."""

    def __init__(self, length: int, offset: Tensor | None) -> None:
        self.length = length
        self.offset = offset  # [B] left padding of each row, None for none

    @abstractmethod
    def take(self, positions: Tensor) -> Tensor:
        """Embeddings [B, ..., D] at the row positions [B, ...]."""

    @abstractmethod
    def slice(self, start: int, stop: int) -> Tensor:
        """Embeddings [B, stop - start, D] at the row positions start to stop - 1 of every row."""

    def _columns(self, positions: Tensor) -> Tensor:
        """Row positions [B, ...] to columns [B, ...]."""
        if self.offset is not None:
            positions = positions + self.offset.view(-1, *[1] * (positions.dim() - 1))
        return positions.clamp(0, self.length - 1)



class DenseMemory(Memory):
    """Embeddings that are at hand: in training, and in the first call of a sequence."""

    def __init__(self, embeddings: Tensor, offset: Tensor | None = None) -> None:
        super().__init__(embeddings.shape[1], offset)
        self.embeddings = embeddings  # [B, L, D]

    def take(self, positions: Tensor) -> Tensor:
        columns = self._columns(positions).flatten(1)  # [B, ...] -> [B, M]
        rows = columns.unsqueeze(-1).expand(-1, -1, self.embeddings.shape[-1])  # [B, M, D]
        return self.embeddings.gather(1, rows).view(*positions.shape, -1)  # [B, ..., D]

    def slice(self, start: int, stop: int) -> Tensor:
        if self.offset is None:
            return self.embeddings[:, start:stop]  # [B, stop - start, D]
        return self.take(_positions(start, stop, self.embeddings))


class TokenMemory(Memory):
    """Embeddings recomputed from token ids when asked for: in decoding, where only the ids are kept."""

    def __init__(self, ids: Tensor, embed: Callable[[Tensor], Tensor], offset: Tensor | None = None) -> None:
        super().__init__(ids.shape[1], offset)
        self.ids = ids  # [B, L]
        self.embed = embed  # [...] ids -> [..., D]

    def take(self, positions: Tensor) -> Tensor:
        columns = self._columns(positions).flatten(1)  # [B, ...] -> [B, M]
        return self.embed(self.ids.gather(1, columns).view(positions.shape))  # [B, ..., D]

    def slice(self, start: int, stop: int) -> Tensor:
        return self.take(_positions(start, stop, self.ids))


def _positions(start: int, stop: int, like: Tensor) -> Tensor:
    """The row positions start to stop - 1, once a row of `like` [B, ...]: [B, stop - start]."""
    return torch.arange(start, stop, device=like.device).expand(like.shape[0], -1)
