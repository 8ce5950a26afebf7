"""Resona (section 3, Algorithm 1): any mixer, with retrieval from the sequence's own past beside it.

    y = alpha * mixer(x) + (1 - alpha) * retrieved(x)

Symbols
    B  batch    T  new positions    D  hidden size    U  chunk_size    N  complete chunks so far    k  top_k
    E  size of a chunk embedding    H  heads          d  head_dim = D / H
    x       [B, T, D]  the block's normalised input: what the prior layer produced, in layer 0 the initial embeddings
    memory  [B, L, D]  the initial embeddings of all L tokens so far; keys and values come from them
The paper leaves open how C and Q learn through a hard top-k, which hidden state asks, and the scale of the memory;
each choice is an option here, and the README's decision table names the evidence for its default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from lrm_recall.context import Context
from lrm_recall.mixers.base import Mixer
from lrm_recall.norms import RMSNorm
from lrm_recall.ops.dispatch import Unsupported, fusion
from lrm_recall.options import check_options
from lrm_recall.resona.gate import gate_weights, mix_retrieved
from lrm_recall.resona.integrate import attend, chunk_attention
from lrm_recall.resona.memory import DenseMemory, Memory
from lrm_recall.resona.search import ENCODERS, NO_CHUNK, chosen_scores, chunk_search, visible_chunks

CHUNK_EMBEDDINGS = "chunk_embeddings"  # their name in a layer's slot of the cache

_NORM_EPS = 1e-6
_START_TEMPERATURE = 10.0  # cosine times this, before the softmax of the gate; learned from there


@dataclass
class Retrieval:
    """What a Resona layer found.

    Attributes:
        indices: [B, T, k] int64, the chunks of each position, best first; NO_CHUNK (-1) where there is none.
        scores: [B, T, k], their cosine similarities (from a GPU in float32); zero where there is no chunk.
        weights: [B, T, k], the gate of each chunk, zero where there is none; what is missing to one went to the
            null chunk. None without a gate.
    """

    indices: Tensor
    scores: Tensor
    weights: Tensor | None


class Resona(Mixer):
    """A mixer with a retrieval branch beside it.

    Args:
        mixer: any module from [B, T, D] to [B, T, D]; a `Mixer` of this library is also handed the context.
        hidden_size: D.
        chunk_size: U, tokens in a chunk. Sequences shorter than U + 1 tokens, such as a short prompt, get the mixer
            alone.
        top_k: k, chunks that each position looks into.
        encoder: "mean" (no parameters), "place" (learned weights by place in the chunk) or "linear" (those, then
            learned maps C and Q to E = `encoder_dim` numbers).
        encoder_dim: E of the linear encoder; None for min(D, 128).
        gate: "null_chunk" weights each chunk's output by a softmax over the k scores and that of a learned null
            chunk, with a learned temperature: C and Q learn through it, and a position may abstain. "none" is one
            softmax over all k U tokens, as the paper writes it: C and Q then get no gradient.
        alpha: weight of the mixer's own output, in [0, 1]; or "learned", a sigmoid of a linear map of x per position.
        num_heads: H of the cross-attention.
        memory_norm: RMSNorm of the initial embeddings before C, W_K and W_V.

    Raises:
        ValueError: an option out of its range, or a head count that does not divide the hidden size.
    """

    def __init__(
        self,
        mixer: nn.Module,
        hidden_size: int,
        *,
        chunk_size: int = 64,
        top_k: int = 1,
        encoder: Literal["mean", "place", "linear"] = "place",
        encoder_dim: int | None = None,
        gate: Literal["null_chunk", "none"] = "null_chunk",
        alpha: float | Literal["learned"] = 0.5,
        num_heads: int = 1,
        memory_norm: bool = True,
    ) -> None:
        super().__init__()
        check_options(Resona, {
            "chunk_size": chunk_size, "top_k": top_k, "encoder": encoder, "encoder_dim": encoder_dim, "gate": gate,
            "alpha": alpha, "num_heads": num_heads, "memory_norm": memory_norm,
        }, "resona")
        for name, value in (("chunk_size", chunk_size), ("top_k", top_k), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"resona: {name} must be at least 1, got {value}")
        if encoder_dim is not None and encoder_dim < 1:
            raise ValueError(f"resona: encoder_dim must be at least 1, got {encoder_dim}")
        if hidden_size % num_heads:
            raise ValueError(f"resona: num_heads {num_heads} does not divide the hidden size {hidden_size}")
        if alpha != "learned" and not 0.0 <= alpha <= 1.0:
            raise ValueError(f"resona: alpha must lie in [0, 1] or be 'learned', got {alpha}")
        self.mixer = mixer
        self.hidden_size = hidden_size
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.num_heads = num_heads
        self.alpha = alpha
        self.gate = gate
        self.memory_norm = RMSNorm(hidden_size, eps=_NORM_EPS) if memory_norm else nn.Identity()
        self.encoder = ENCODERS[encoder](hidden_size, chunk_size, encoder_dim)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if gate == "null_chunk":
            self.log_temperature = nn.Parameter(torch.empty(()))
            self.null_chunk = nn.Parameter(torch.empty(self.encoder.dim))
        if alpha == "learned":
            self.alpha_proj = nn.Linear(hidden_size, 1)
        self.init_weights(0.02)

    @classmethod
    def check_options(cls, hidden_size: int, options: dict[str, Any]) -> None:
        """Raise ValueError unless `Resona(mixer, hidden_size, **options)` would be built."""
        check_options(cls, options, "resona")
        with torch.device("meta"):
            cls(nn.Identity(), hidden_size, **options)

    def init_weights(self, std: float) -> None:
        self.encoder.init_weights()
        if self.gate == "null_chunk":
            init.constant_(self.log_temperature, math.log(_START_TEMPERATURE))
            init.normal_(self.null_chunk, mean=0.0, std=1.0)

    def state_size(self, sequence_length: int | None = None) -> int:
        """State of the mixer beside; what retrieval itself keeps is the cache's ids and chunk embeddings."""
        if not isinstance(self.mixer, Mixer):
            raise ValueError(f"{type(self.mixer).__name__} is not a Mixer and does not tell the size of its state")
        return self.mixer.state_size(sequence_length)

    def forward(self, x: Tensor, context: Context | None = None, *, memory: Tensor | None = None) -> Tensor:
        """Mix x and what it retrieves.

        Args:
            x: [B, T, D].
            context: padding, cache, memory and precomputed chunks, handed down by a RecurrentLM.
            memory: [B, T, D] initial embeddings, for use outside a RecurrentLM; x itself when neither is given.

        Returns:
            [B, T, D]; exactly the mixer's output at positions before which no chunk is complete.

        Raises:
            ValueError: precomputed chunks of another shape, or that a position must not see; a memory of another shape.
        """
        context = context or Context()
        mixed = self.mixer(x, context) if isinstance(self.mixer, Mixer) else self.mixer(x)  # [B, T, D]
        store = self._memory(x, context, memory)
        if (output := self._fused_step(x, mixed, context, store)) is not None:
            return output
        retrieval, chunks_in_memory, tokens = self._retrieve(x, context, store)
        if chunks_in_memory == 0:
            return mixed
        few = in_buffers(context) or x.shape[1] * retrieval.indices.shape[-1] < chunks_in_memory  # positions that ask
        retrieved = self._integrate(x, store, retrieval, None if few else chunks_in_memory, tokens)  # [B, T, D]
        alpha = self.alpha_proj(x).sigmoid() if self.alpha == "learned" else self.alpha  # [B, T, 1] or a number
        return mix_retrieved(mixed, retrieved, retrieval.indices, alpha)

    def retrieve(self, x: Tensor, context: Context | None = None, *, memory: Tensor | None = None) -> Retrieval:
        """The chunks that each position of x [B, T, D] picks; arguments as for `forward`."""
        context = context or Context()
        return self._retrieve(x, context, self._memory(x, context, memory))[0]

    def _fused_step(self, x: Tensor, mixed: Tensor, context: Context, memory: Memory) -> Tensor | None:
        """The rest of a step on buffers in kernels made for one token; None elsewhere, or where they cannot take it."""
        if not in_buffers(context) or (step := fusion("resona_step", x)) is None:
            return None
        try:
            return step(x, mixed, self, context.cache[CHUNK_EMBEDDINGS], memory, context.past_length)
        except Unsupported:  # such as a large batch, for which torch's own products are good
            return None

    def _memory(self, x: Tensor, context: Context, memory: Tensor | None) -> Memory:
        if memory is not None and memory.shape != x.shape:
            raise ValueError(f"memory must have the shape of x {tuple(x.shape)}, got {tuple(memory.shape)}")
        if memory is not None or context.memory is None:
            return DenseMemory(x if memory is None else memory, context.offset)
        return context.memory

    def _retrieve(
        self, x: Tensor, context: Context, memory: Memory
    ) -> tuple[Retrieval, int, tuple[Tensor, Tensor] | None]:
        """The retrieval of each position, the number N of chunks in the memory, and its tokens, as from `_encode`."""
        tokens = None
        visible = visible_chunks(context.positions(x), self.chunk_size)  # [B or 1, T]
        if in_buffers(context):
            chunks = self._renew_newest(memory, visible, context.cache[CHUNK_EMBEDDINGS])  # [B, N, E]
        else:
            chunks, tokens = self._encode(memory, context.cache)  # [B, N, E]
        queries = self.encoder.queries(x)  # [B, T, E]
        indices = context.chunk_indices
        if indices is not None:
            _check_chosen(indices, visible.expand(len(x), -1))
        if chunks.shape[1] == 0:
            indices = visible.new_full((*x.shape[:2], self.top_k), NO_CHUNK) if indices is None else indices
            return Retrieval(indices, x.new_zeros(indices.shape), None), 0, None
        if indices is None:
            indices, scores = chunk_search(queries, chunks, visible, self.top_k)  # [B, T, k] each
        else:
            scores = chosen_scores(queries, chunks, indices)  # [B, T, k]
        weights = None
        if self.gate == "null_chunk":
            weights = gate_weights(queries, scores, indices, self.null_chunk, self.log_temperature)  # [B, T, k]
        return Retrieval(indices, scores, weights), chunks.shape[1], tokens

    def _integrate(
        self, x: Tensor, memory: Memory, retrieval: Retrieval, chunks: int | None,
        tokens: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """Cross-attention from x [B, T, D] into its chunks: [B, T, D].

        Args:
            chunks: N, to project every chunk of the memory once; None to project those of each position alone.
            tokens: those of all N chunks, normalised, [B, N, U, D] for the keys and again for the values; None to
                read them from the memory.
        """
        indices, weights = retrieval.indices, retrieval.weights
        queries = self.q_proj(x).unflatten(-1, (self.num_heads, -1))  # [B, T, H, d]
        if chunks is None:
            chosen = self.memory_norm(memory.take(self._positions(indices)))  # [B, T, k, U, D]
            keys, values = self._keys_values(chosen, chosen)  # [B, T, k, U, H, d]
            output = attend(queries, keys, values, indices, weights)  # [B, T, H, d]
        else:
            if tokens is None:
                whole = memory.slice(0, chunks * self.chunk_size).unflatten(1, (chunks, self.chunk_size))
                tokens = (self.memory_norm(whole),) * 2  # [B, N, U, D] each
            keys, values = self._keys_values(*tokens)  # [B, N, U, H, d]
            output = chunk_attention(queries, keys, values, indices, weights)  # [B, T, H, d]
        return self.o_proj(output.flatten(2))  # [B, T, H, d] -> [B, T, D]

    def _positions(self, chunks: Tensor) -> Tensor:
        """Row positions [..., U] of the tokens of chunks [...]; those of chunk 0 for NO_CHUNK."""
        return chunks.clamp(min=0)[..., None] * self.chunk_size + torch.arange(self.chunk_size, device=chunks.device)

    def _keys_values(self, for_keys: Tensor, for_values: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised tokens [..., D], the same twice, to keys and values [..., H, d]."""
        heads = (self.num_heads, -1)
        return self.k_proj(for_keys).unflatten(-1, heads), self.v_proj(for_values).unflatten(-1, heads)

    def _renew_newest(self, memory: Memory, newest: Tensor, table: Tensor) -> Tensor:
        """Encode each row's newest chunk afresh, in a table [B, N, E] of fixed size; newest: [B, 1] its index.

        Most of the time that chunk is not complete and no position may see it yet: what is written once its last
        token is there stays.
        """
        tokens = self.memory_norm(memory.take(self._positions(newest)))  # [B, 1, U, D]
        fresh = self.encoder.chunks(tokens)  # [B, 1, E]
        return table.scatter_(1, newest[..., None].expand_as(fresh), fresh.to(table.dtype))

    def chunk_embeddings(self, memory: Memory, cache: dict[str, Tensor] | None) -> Tensor:
        """Embeddings [B, N, E] of the chunks that are complete in some row; old ones come from the cache.

        Where rows began at different positions, the last chunks are complete in some rows only; those are encoded
        afresh in each call and enter the cache once every row has completed them.
        """
        return self._encode(memory, cache)[0]

    def _encode(
        self, memory: Memory, cache: dict[str, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """`chunk_embeddings`, and where one kernel normalised the whole memory for all who read it, also its tokens
        [B, N, U, D] for the keys and for the values."""
        shortest = memory.length if memory.offset is None else memory.length - int(memory.offset.max())
        longest = memory.length if memory.offset is None else memory.length - int(memory.offset.min())
        known = None if cache is None else cache.get(CHUNK_EMBEDDINGS)
        start, stop = 0 if known is None else known.shape[1], longest // self.chunk_size
        tokens = memory.slice(start * self.chunk_size, stop * self.chunk_size)  # [B, (stop - start) U, D]
        readers = self._norm_for_all(tokens) if start == 0 and stop > 0 else None
        normed = (self.memory_norm(tokens),) if readers is None else readers
        for_search, *others = (y.unflatten(1, (stop - start, self.chunk_size)) for y in normed)
        fresh = self.encoder.chunks(for_search)  # [B, stop - start, E]
        chunks = fresh if known is None else torch.cat([known, fresh], dim=1)
        if cache is not None:
            cache[CHUNK_EMBEDDINGS] = chunks[:, : max(shortest, 0) // self.chunk_size]
        return chunks, tuple(others) or None

    def _norm_for_all(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The normalised tokens, of their shape, for the search, the keys and the values, from a kernel that adds up
        what the three send back; None where there is none, and each has to normalise them."""
        norm = fusion("memory_norm", tokens) if type(self.memory_norm) is RMSNorm else None
        try:
            return None if norm is None else norm(tokens, self.memory_norm.weight, self.memory_norm.eps)
        except Unsupported:
            return None


def in_buffers(context: Context) -> bool:
    """Whether this call is a step on buffers of fixed size (`lrm_recall.decode`), which count in tensors."""
    return isinstance(context.past_length, Tensor)


def _check_chosen(indices: Tensor, visible: Tensor) -> None:
    """Refuse precomputed chunks [B, T, k] that would show a position its future; visible: [B, T]."""
    if indices.dim() != 3 or indices.shape[:2] != visible.shape or not indices.shape[2] or indices.is_floating_point():
        raise ValueError(f"chunk_indices must be integers of shape [batch, positions, k], here [{visible.shape[0]}, "
                         f"{visible.shape[1]}, k], got {indices.dtype} {tuple(indices.shape)}")
    if bool((indices >= visible[..., None]).any()) or bool((indices < NO_CHUNK).any()):
        raise ValueError(f"chunk_indices must be {NO_CHUNK} (none) or name chunks that lie wholly before their "
                         "position; some do not")
