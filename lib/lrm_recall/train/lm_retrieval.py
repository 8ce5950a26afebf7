"""Which chunks a trained model retrieves in one article: what a reader can look at.

For each Resona layer, and each chunk of the article, the share of its positions that look into each earlier chunk (the
best of their k), and the weight that the gate gives to what they found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrm_recall.resona.layer import Retrieval
from lrm_recall.resona.search import NO_CHUNK
from lrm_recall.resona.watch import watched

if TYPE_CHECKING:
    from lrm_recall.data.prepared import Prepared
    from lrm_recall.model import RecurrentLM

_DIGITS = 3


@torch.no_grad()
def retrieval_map(
    model: RecurrentLM, prepared: Prepared, decode: Any, *, split: str = "test", length: int, article: int = 0
) -> dict[str, Any]:
    """What each chunk of an article retrieves.

    Args:
        model: a model with Resona layers, in evaluation mode.
        decode: from a list of ids to their text (a tokenizer's `decode`).
        length: tokens of the article that are read, at most.
        article: row of the split; the first that is as long as this counts, so that there is something to retrieve.

    Returns:
        title, chunk_size, texts (of each of the N chunks), and layers: for each its index (`layer`), `shares` [N][N]
        (row: the chunk that asks, column: the chunk that is read; a row sums to the share of its positions that found
        one) and `weights` [N], the mean weight of what was found. Plain lists, for a row of results.
    """
    rows = prepared.splits[split]
    lengths = [len(ids) for ids in rows["input_ids"]]
    chosen = next((i for i in range(article, len(rows)) if lengths[i] >= length), lengths.index(max(lengths)))
    ids = torch.tensor([rows[chosen]["input_ids"][:length]])  # [1, T]
    layers = {index: model.model.layers[index].mixer for index in model.config.resona_layers}
    with watched(layers) as found:
        model.eval().model(input_ids=ids.to(model.device), use_cache=False)
    layer = layers[model.config.resona_layers[0]]
    chunks = ids.shape[1] // layer.chunk_size
    texts = ids[0, : chunks * layer.chunk_size].view(chunks, layer.chunk_size).tolist()
    return {
        "title": rows[chosen]["title"],
        "chunk_size": layer.chunk_size,
        "texts": [decode(text) for text in texts],
        "layers": [{"layer": index, **_summary(each, chunks, layer.chunk_size)} for index, each in found.items()],
    }


def _summary(retrieval: Retrieval, chunks: int, chunk_size: int) -> dict[str, list]:
    positions = chunks * chunk_size
    best = retrieval.indices[0, :positions, 0].view(chunks, chunk_size).cpu()  # [1, T, k] -> [N, U]
    shares = torch.stack([(best == n).float().mean(dim=1) for n in range(chunks)], dim=1)  # [N, N]
    if retrieval.weights is None:
        weight = (best != NO_CHUNK).float()  # [N, U]
    else:
        weight = retrieval.weights[0, :positions].sum(dim=-1).float().view(chunks, chunk_size).cpu()  # [N, U]
    return {"shares": _rounded(shares), "weights": _rounded(weight.mean(dim=1))}


def _rounded(values: Tensor) -> list:
    return [[round(x, _DIGITS) for x in row] if isinstance(row, list) else round(row, _DIGITS)
            for row in values.tolist()]  # fmt: skip
