"""Contextual search (Resona, section 3.1, Algorithm 2): which chunks of the past does each position look into?

Symbols
    B  batch          T  query positions       D  hidden size        E  size of a chunk or query embedding
    U  chunk_size     N  chunks so far          k  top_k
The initial embeddings are cut into N chunks of U tokens. A context encoder C makes one embedding of each chunk, a
query encoder Q one of each position's hidden state; the k chunks of largest cosine similarity are taken, among those
that lie wholly before the query (section 3.2). Neither a T x T mask nor, at once, the T x N scores are ever held.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.ops.dispatch import dispatched

NO_CHUNK = -1  # index of a chunk that was not found

_SCORES_AT_ONCE = 1 << 24  # elements of the T x N score matrix held at a time


def unit_rows_torch(x: Tensor) -> Tensor:
    """x [..., E] to unit length in its last dimension."""
    return F.normalize(x, dim=-1)


def pool_chunks_torch(tokens: Tensor, place: Tensor) -> Tensor:
    """Tokens of chunks [B, N, U, D], weighted by place and channel [U, D], added up: [B, N, D]."""
    return torch.einsum("bnud,ud->bnd", tokens, place)


unit_rows = dispatched("unit_rows", unit_rows_torch)
pool_chunks = dispatched("pool_chunks", pool_chunks_torch)


class MeanEncoder(nn.Module):
    """C is the mean of a chunk's tokens and Q the hidden state itself: no parameters, E = D."""

    def __init__(self, hidden_size: int, chunk_size: int, encoder_dim: int | None = None) -> None:
        super().__init__()
        if encoder_dim not in (None, hidden_size):
            raise ValueError(f"resona: encoder_dim {encoder_dim} needs encoder 'linear'; the others keep the hidden "
                             f"size {hidden_size}")
        self.dim = hidden_size

    def chunks(self, tokens: Tensor) -> Tensor:
        """Tokens of chunks [B, N, U, D] to unit embeddings [B, N, E]."""
        return unit_rows(tokens.mean(dim=2))  # [B, N, U, D] -> [B, N, D]

    def queries(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, D] to unit embeddings [B, T, E]."""
        return unit_rows(x)

    def init_weights(self) -> None:
        """Nothing is learned here."""


class PlaceEncoder(MeanEncoder):
    """C weighs a chunk's tokens, channel by channel, by their place in it; the weights [U, D] start as the mean.

    A learned map of the mean cannot tell a key from the value behind it; these weights can, with U D numbers.
    """

    def __init__(self, hidden_size: int, chunk_size: int, encoder_dim: int | None = None) -> None:
        super().__init__(hidden_size, chunk_size, encoder_dim)
        self.place = nn.Parameter(torch.empty(chunk_size, hidden_size))

    def chunks(self, tokens: Tensor) -> Tensor:
        """Tokens of chunks [B, N, U, D] to unit embeddings [B, N, E]."""
        return unit_rows(pool_chunks(tokens, self.place))  # [B, N, U, D] -> [B, N, D]

    def init_weights(self) -> None:
        """Start from the mean of the chunk."""
        init.constant_(self.place, 1 / len(self.place))


class LinearEncoder(nn.Module):
    """Weights by place, then a linear map to E numbers; Q is a linear map too.

    Both maps start as the same projection onto E orthogonal directions, so that cosines begin as those of the mean,
    and E may be far smaller than D: E numbers a chunk is what a decoding cache must keep.
    """

    def __init__(self, hidden_size: int, chunk_size: int, encoder_dim: int | None = None) -> None:
        super().__init__()
        self.dim = min(hidden_size, 128) if encoder_dim is None else encoder_dim
        self.place = nn.Parameter(torch.empty(chunk_size, hidden_size))
        self.chunk_proj = nn.Linear(hidden_size, self.dim, bias=False)
        self.query_proj = nn.Linear(hidden_size, self.dim, bias=False)

    def chunks(self, tokens: Tensor) -> Tensor:
        """Tokens of chunks [B, N, U, D] to unit embeddings [B, N, E]."""
        pooled = pool_chunks(tokens, self.place)  # [B, N, U, D] -> [B, N, D]
        return unit_rows(self.chunk_proj(pooled))  # [B, N, D] -> [B, N, E]

    def queries(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, D] to unit embeddings [B, T, E]."""
        return unit_rows(self.query_proj(x))  # [B, T, D] -> [B, T, E]

    @torch.no_grad()
    def init_weights(self) -> None:
        """The mean of the chunk, and one shared orthogonal projection."""
        init.constant_(self.place, 1 / len(self.place))
        init.orthogonal_(self.chunk_proj.weight)
        init.copy_(self.query_proj.weight, self.chunk_proj.weight)


ENCODERS: dict[str, type[nn.Module]] = {"mean": MeanEncoder, "place": PlaceEncoder, "linear": LinearEncoder}


def visible_chunks(positions: Tensor, chunk_size: int) -> Tensor:
    """How many chunks lie wholly before each position.

    Chunk n holds the tokens nU to nU + U - 1, so position p may look into it when nU + U <= p (section 3.2).

    Args:
        positions: [..., T] int64 positions in the row; negative ones (padding) see nothing.

    Returns:
        [..., T] int64: the chunks 0 to this number minus one are visible.
    """
    return positions.clamp(min=0) // chunk_size


@torch.no_grad()
def search(queries: Tensor, chunks: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """The k visible chunks of largest inner product with each query, best first.

    The choice itself has no gradient; scores that do are recomputed for the chosen chunks alone.

    Args:
        queries: [B, T, E]; chunks: [B, N, E]; both of unit length, so that the inner product is the cosine.
        visible: [B, T] or [1, T] int64, from `visible_chunks`.

    Returns:
        [B, T, k] int64, NO_CHUNK where fewer than k chunks are visible.
    """
    (batch, length, _), num_chunks = queries.shape, chunks.shape[1]
    found = min(top_k, num_chunks)
    indices = torch.full((batch, length, top_k), NO_CHUNK, dtype=torch.int64, device=queries.device)
    order = torch.arange(num_chunks, device=queries.device)
    visible = visible.expand(batch, -1)
    step = max(1, _SCORES_AT_ONCE // (batch * num_chunks))
    for start in range(0, length, step):
        rows = slice(start, start + step)
        hidden = order >= visible[:, rows, None]  # [B, t, N] chunks that are not wholly in the past
        scores = torch.matmul(queries[:, rows], chunks.transpose(1, 2)).masked_fill_(hidden, -torch.inf)  # [B, t, N]
        best, chosen = scores.topk(found, dim=-1)  # [B, t, found]
        indices[:, rows, :found] = chosen.masked_fill_(best == -torch.inf, NO_CHUNK)
    return indices


def chosen_scores(queries: Tensor, chunks: Tensor, indices: Tensor) -> Tensor:
    """Cosine of each query with its chosen chunks, differentiable: [B, T, k], zero where NO_CHUNK.

    Args:
        queries: [B, T, E]; chunks: [B, N, E]; indices: [B, T, k] int64.
    """
    scores = torch.einsum("bte,btke->btk", queries, take_chunks(chunks, indices))
    return scores.masked_fill(indices == NO_CHUNK, 0.0)


def chunk_search_torch(queries: Tensor, chunks: Tensor, visible: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`search`, and the scores of what it found.

    Args:
        queries: [B, T, E]; chunks: [B, N, E] with N at least 1; both of unit length.
        visible: [B, T] or [1, T] int64, from `visible_chunks`.
        top_k: k.

    Returns:
        indices [B, T, k] int64, NO_CHUNK where fewer than k chunks are visible; and scores [B, T, k], zero there,
        with gradients to queries and chunks.
    """
    indices = search(queries, chunks, visible, top_k)
    return indices, chosen_scores(queries, chunks, indices)


def take_chunks(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table of chunks [B, N, ...] at the indices [B, T, k]: [B, T, k, ...]; NO_CHUNK reads chunk 0."""
    batch, num_chunks = table.shape[:2]
    first = torch.arange(batch, device=indices.device).view(-1, 1, 1) * num_chunks  # [B, 1, 1]
    rows = (indices.clamp(min=0) + first).flatten()  # [B, T, k] -> [B * T * k]
    return table.flatten(0, 1).index_select(0, rows).view(*indices.shape, *table.shape[2:])


chunk_search = dispatched("chunk_search", chunk_search_torch)
