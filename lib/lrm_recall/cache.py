"""What one sequence carries between calls of a RecurrentLM: the state of each layer, and the ids of its tokens.

Resona needs no keys and values here. They are functions of the token ids, so the ids (8 bytes a token, shared by all
layers) and one small embedding a chunk (kept in the slot of its layer) are enough.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RecurrentCache:
    """State of a batch of sequences, as transformers' `generate` passes it around under `past_key_values`.

    Attributes:
        layers: one dict a layer; its mixer keeps tensors there whose first dimension is the batch.
        ids: [B, length] int64, every token so far, padding included; None until the first call, and for models
            without Resona.
        offset: [B] int64, positions of left padding of each row; None while no row has any.
        length: positions seen so far, padding included.
    """

    is_compileable = False  # transformers asks; shapes grow here

    def __init__(self, num_layers: int) -> None:
        self.layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
        self.ids: Tensor | None = None
        self.offset: Tensor | None = None
        self.length = 0

    def get_seq_length(self) -> int:
        """Positions seen so far (the name that `generate` asks for)."""
        return self.length

    def append_ids(self, ids: Tensor) -> Tensor:
        """Add the ids [B, T] of new tokens and return all of them [B, length + T]."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        return self.ids

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` [B'] of every tensor, in that order (beam search)."""
        for layer in self.layers:
            for name, tensor in layer.items():
                layer[name] = tensor.index_select(0, beam_idx.to(tensor.device))
        if self.ids is not None:
            self.ids = self.ids.index_select(0, beam_idx.to(self.ids.device))
        if self.offset is not None:
            self.offset = self.offset.index_select(0, beam_idx.to(self.offset.device))

    def nbytes(self) -> int:
        """Bytes held at present: states, ids and chunk embeddings."""
        tensors = [tensor for layer in self.layers for tensor in layer.values()]
        tensors += [tensor for tensor in (self.ids, self.offset) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
