"""Chunks found beforehand beside those that a model searches for itself: how many are the same, what the loss is.

T positions of a sequence, k chunks of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrm_recall.data.errors import DataError
from lrm_recall.data.retrieval import WithChunkIndices
from lrm_recall.ops.loss import IGNORED
from lrm_recall.resona.search import NO_CHUNK, visible_chunks
from lrm_recall.resona.watch import watched


@torch.no_grad()
def compare(model: Any, sequences: WithChunkIndices, count: int | None = None) -> dict[str, Any]:
    """A model under indices found beforehand and under its own search.

    Args:
        model: a RecurrentLM with Resona layers; its mode is kept, so hand it over in evaluation mode.
        sequences: what `with_chunk_indices` gives.
        count: how many of them, the first ones; None for all.

    Returns:
        loss_search, loss_indices: mean loss of a token, in nats; loss_difference: the second less the first.
        overlap: layer -> share of the layer's own choices that are among the indices, over positions that have a
        choice; overlap_by_chance: layer -> what as many indices drawn at random would give; found: share of those
        positions that have an index; tokens: how many were predicted.

    Raises:
        DataError: the model retrieves nowhere, its chunks have another size than those that the indices count, or no
            sequence has two tokens.
    """
    layers = {index: model.model.layers[index].mixer for index in model.config.resona_layers}
    if not layers:
        raise DataError("the model has no Resona layers, so there is no search to compare with")
    sequences.check_fits(next(iter(layers.values())).chunk_size)
    loss = {"search": 0.0, "indices": 0.0}
    shared, drawn = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    positions = with_index = tokens = 0
    for item in (sequences[i] for i in range(len(sequences) if count is None else min(count, len(sequences)))):
        ids, indices = item["input_ids"][None].to(model.device), item["chunk_indices"][None].to(model.device)
        labels = item.get("labels", item["input_ids"])[None].to(model.device)  # [1, t]
        predicted = int((labels[:, 1:] != IGNORED).sum())
        if not predicted:
            continue
        with watched(layers) as chosen:
            own = model(ids, labels=labels, use_cache=False).loss
        given = model(ids, labels=labels, chunk_indices=indices, use_cache=False).loss
        loss["search"] += float(own) * predicted
        loss["indices"] += float(given) * predicted
        tokens += predicted
        for index, layer in layers.items():
            visible = visible_chunks(torch.arange(ids.shape[1], device=ids.device), layer.chunk_size)  # [T]
            asking = visible > 0
            same = _shared(chosen[index].indices[0][asking], indices[0][asking])  # [positions that ask]
            shared[index] += float(same.sum())
            number = (indices[0][asking] != NO_CHUNK).sum(dim=-1)
            drawn[index] += float((number / visible[asking]).sum())
        positions += int(asking.sum())
        with_index += int((number > 0).sum())
    if not tokens:
        raise DataError("there is no sequence of two or more tokens to compare on")
    return {
        "loss_search": loss["search"] / tokens,
        "loss_indices": loss["indices"] / tokens,
        "loss_difference": (loss["indices"] - loss["search"]) / tokens,
        "overlap": {index: value / max(positions, 1) for index, value in shared.items()},
        "overlap_by_chance": {index: value / max(positions, 1) for index, value in drawn.items()},
        "found": with_index / max(positions, 1),
        "tokens": tokens,
    }


def _shared(own: Tensor, given: Tensor) -> Tensor:
    """Share of the chunks own [P, k] that are among given [P, k']: [P]."""
    real = own != NO_CHUNK
    among = (own[..., None] == given[..., None, :]).any(dim=-1) & real  # [P, k, k'] -> [P, k]
    return among.sum(dim=-1) / real.sum(dim=-1)
