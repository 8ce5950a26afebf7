"""What a block hands every mixer beside its input.

One small object, so that every mixer has the same call, `mixer(x, context)`, and a mixer that does not need a
field never mentions it.

B batch, T new positions of this call, D hidden size, k retrieved chunks per query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lrm_recall.resona.memory import Memory


@dataclass
class Context:
    """Padding, cache and memory of one call of a layer.

    Attributes:
        mask: [B, T] bool, True where the position holds a real token; None when nothing is padded. Rows are padded
            on one side only. Right padding needs no care in a causal layer; left padding must leave no trace.
        offset: [B] int64, how many positions of left padding each row has had since its sequence began; None means
            zero for every row. The position of new token t in its own row is `past_length + t - offset`.
        past_length: positions already seen by the cache, padding included; a tensor of no dimension where the step is
            captured in a CUDA graph.
        cache: this layer's own slot of the cache, a dict of tensors whose first dimension is the batch; the mixer
            reads it and writes it in place. None when the caller wants no cache.
        memory: the initial embeddings, for Resona layers, which normalise them.
        chunk_indices: [B, T, k] int64, chunks found beforehand (-1 for none), for Resona layers; None to search.
    """

    mask: Tensor | None = None
    offset: Tensor | None = None
    past_length: int | Tensor = 0
    cache: dict[str, Tensor] | None = None
    memory: Memory | None = None
    chunk_indices: Tensor | None = None

    def positions(self, x: Tensor) -> Tensor:
        """Position of each token of x [B, T, D] in its own row: [1, T], or [B, T] when rows are padded on the left.

        Padding has negative positions.
        """
        positions = torch.arange(x.shape[1], device=x.device)[None] + self.past_length  # [1, T]
        return positions if self.offset is None else positions - self.offset[:, None]
