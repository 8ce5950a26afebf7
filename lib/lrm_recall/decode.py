"""One decoding step as one CUDA graph.

A step of a 1.3B model reads 2.7 GB of weights in about a millisecond, and launching its several hundred kernels from
Python takes forty. Where every state is of constant size the whole step can be captured once and replayed with one
launch. The graph owns its buffers; the cache that is being decoded refers to them. When another cache is decoded, its
states are copied in, and the cache that had them gets copies of its own.

What a Resona model keeps does grow: the ids of all tokens, and the embeddings of all chunks. So do attention's keys
and values. Their buffers have room for more than there is, the step counts on the device how far they are filled, and
once they are full a step with more room is captured. Keys and values may fill much of a GPU: they move into the buffers
layer by layer, from then on the cache refers to the filled part of those, and very large buffers go with their cache.

In a graph a Resona layer's retrieval is a branch beside the layer's mixer (`lrm_recall.ops.beside`).

Symbols: B rows that are decoded together, C capacity in tokens, U chunk_size, E size of a chunk embedding.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lrm_recall.cache import RecurrentCache
from lrm_recall.ops.beside import beside
from lrm_recall.ops.linear import project
from lrm_recall.resona.layer import CHUNK_EMBEDDINGS, Resona
from lrm_recall.resona.memory import TokenMemory

if TYPE_CHECKING:
    from lrm_recall.model import RecurrentLM

_WARM_UP = 2  # steps before the capture: kernels are compiled and workspaces allocated in the first
_LEAST_ROOM = 512  # tokens that fit at least before another capture
_MOST_KEPT = 0.4  # of a GPU's memory: larger buffers of keys and values leave no room for those of the next prompt


class Decoder:
    """Decodes the caches of one model, each token through a graph where the model allows it.

    A copy of a model gets a Decoder that has captured nothing yet.
    """

    def __init__(self) -> None:
        self._graph: Step | None = None
        self._cache: weakref.ref[RecurrentCache] | None = None  # the one whose steps were decided upon last

    def __deepcopy__(self, memo: dict) -> Decoder:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()

    def step(self, model: RecurrentLM, ids: Tensor, cache: RecurrentCache) -> Tensor | None:
        """Logits [B, 1, V] behind the tokens ids [B, 1], the cache moved on; None where the model has to be run."""
        if ids.shape[1] != 1 or not cache.length or model.training or torch.is_grad_enabled() or not self._runs(ids):
            return None
        rows = next((state.shape[0] for state in cache.layers[0].values()), None)
        if rows != ids.shape[0]:
            return None  # the model says what is wrong
        outgrown = self._graph is not None and not self._graph.has_room(rows, cache.length)  # or cut by reorder_cache
        if self._cache is None or self._cache() is not cache or outgrown:  # nobody changes a model between two tokens
            self._cache = weakref.ref(cache, self._when_gone())
            if not can_capture(model):
                self._graph = None
            elif self._graph is None or outgrown or not self._graph.fits(model):
                self._graph = None  # before another is captured, for its memory
                self._graph = self._capture(model, cache)
        return None if self._graph is None else self._graph.step(model, ids, cache)

    def _when_gone(self) -> Callable[[weakref.ref], None]:
        """What to do once a cache is gone: let buffers go with it that would leave no room for the next prompt.

        Smaller ones stay for the next cache, as does the graph.
        """
        decoder = weakref.ref(self)

        def gone(cache: weakref.ref) -> None:
            own = decoder()
            if own is None or own._cache is not cache or own._graph is None:
                return
            if own._graph.growing_bytes() > own._most_kept(own._graph):
                own._graph = None

        return gone

    def _most_kept(self, graph: Step) -> float:
        """Bytes of growing states that a graph without a cache may hold."""
        if graph.device.type != "cuda":
            return math.inf
        return _MOST_KEPT * torch.cuda.get_device_properties(graph.device).total_memory

    def _runs(self, ids: Tensor) -> bool:
        """Whether a graph can be replayed here."""
        return ids.is_cuda and not torch.cuda.is_current_stream_capturing()

    def _capture(self, model: RecurrentLM, cache: RecurrentCache) -> Step:
        return DecodingGraph(model, cache)


class StepCache(RecurrentCache):
    """The cache of a step whose tensors stay where they are; `length` [] and `offset` [B] are int64 tensors too."""

    def append_ids(self, ids: Tensor) -> Tensor:
        """Write the ids [B, 1] into the first free column; all columns [B, C], filled or not."""
        return self.ids.index_copy_(1, self.length.view(1), ids)


class Step:
    """One decoding step on buffers of fixed size: what a DecodingGraph captures, and what a CPU can run as it is.

    Args:
        model: one that `can_capture` accepts.
        cache: one that the model returned for a batch of that size; its growing states move into the buffers, which it
            then refers to, and the rest is only read.
    """

    def __init__(self, model: RecurrentLM, cache: RecurrentCache) -> None:
        self._fingerprint = fingerprint(model)
        blocks = list(enumerate(model.model.layers))
        self._resona = {index: block.mixer for index, block in blocks if isinstance(block.mixer, Resona)}
        self._growing = {index: growing for index, block in blocks if (growing := growing_states(block.mixer))}
        grows = self._resona or self._growing
        self.capacity = capacity_for(cache.length) if grows else sys.maxsize
        device = model.device
        self._owner = weakref.ref(cache)  # the cache that refers to the buffers,
        self._lent: list[dict[str, Tensor]] = []  # by these tensors
        self._lent_ids: Tensor | None = None
        self._lent_length = 0
        self._padding = 0  # most left padding of its rows
        with torch.inference_mode(False), torch.no_grad():
            self._states: list[dict[str, Tensor]] = []
            cache.layers = [dict(layer) for layer in cache.layers]  # its own, should a copy of the cache share them
            for index, layer in enumerate(cache.layers):
                self._states.append({name: self._buffer(index, name, state) for name, state in layer.items()})
                for name in self._growing.get(index, ()):  # the cache's own memory is free for the next layer's buffers
                    layer[name] = self._filled(index, name, layer[name])
            batch = next(iter(self._states[0].values())).shape[0]
            self._new_ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # [B, 1]
            self._ids = self._new_ids.new_zeros(batch, self.capacity) if self._resona else None  # [B, C]
            self._length = torch.full((), cache.length if grows else 0, dtype=torch.int64, device=device)
            self._offset = torch.zeros(batch, dtype=torch.int64, device=device)  # [B]

    def _buffer(self, layer: int, name: str, state: Tensor) -> Tensor:
        """Room for a state: its own size, or what the capacity allows for the chunk embeddings [B, N, E] and for what
        else grows."""
        shape = list(state.shape)
        if name == CHUNK_EMBEDDINGS:
            shape[1] = self.capacity // self._resona[layer].chunk_size + 1  # the last for one that cannot be complete
        elif name in (dims := self._growing.get(layer, {})):
            shape[dims[name]] = self.capacity
        else:
            return state.clone()
        return state.new_zeros(shape)

    def _filled(self, layer: int, name: str, state: Tensor) -> Tensor:
        """The part of a growing state's buffer that holds the state, which is copied there if it does not lie there."""
        dim = self._growing[layer][name]
        filled = self._states[layer][name].narrow(dim, 0, state.shape[dim])
        if filled.data_ptr() != state.data_ptr() or filled.stride() != state.stride():
            inside = filled.untyped_storage().data_ptr() == state.untyped_storage().data_ptr()  # another part of it
            filled.copy_(state.clone() if inside else state)
        return filled

    def _run(self, model: RecurrentLM) -> Tensor:
        """Run the model on the buffers and leave the new states in them."""
        cache = StepCache(len(self._states))
        cache.layers = [dict(layer) for layer in self._states]
        cache.ids, cache.length, cache.offset = self._ids, self._length, self._offset
        with beside(self._resona.values()):  # closed before the buffers change that retrieval reads: length and states
            outputs = model.model(input_ids=self._new_ids, past_key_values=cache)
        for layer, new in zip(self._states, cache.layers, strict=True):
            for name, state in layer.items():
                if new[name].data_ptr() != state.data_ptr():  # some kernels change their state in place
                    state.copy_(new[name])
        self._length.add_(1)
        return project(outputs.last_hidden_state, model.lm_head)[0]

    def _advance(self, model: RecurrentLM) -> Tensor:
        """Logits [B, 1, V] behind the new ids, the buffers moved on by one position."""
        return self._run(model)

    @property
    def device(self) -> torch.device:
        return self._length.device

    def growing_bytes(self) -> int:
        """Of the buffers whose states grow with every token."""
        return sum(self._states[index][name].nbytes for index, growing in self._growing.items() for name in growing)

    def fits(self, model: RecurrentLM) -> bool:
        """Whether this still is the step of the model."""
        return self._fingerprint == fingerprint(model)

    def has_room(self, rows: int, length: int) -> bool:
        """Whether a batch of this size, which has seen this many positions, can be given another."""
        return rows == len(self._new_ids) and length < self.capacity

    def step(self, model: RecurrentLM, ids: Tensor, cache: RecurrentCache) -> Tensor:
        """Logits [B, 1, V] behind the tokens ids [B, 1]; the cache moves on by one position."""
        if not self._intact(cache):
            self._take(model, cache)
        self._new_ids.copy_(ids)
        self._lent_length = 0  # after an error halfway the cache is taken anew
        logits = self._advance(model)
        cache.length += 1
        self._lend(cache)
        return logits.clone()

    def _take(self, model: RecurrentLM, cache: RecurrentCache) -> None:
        """Bring the states of a cache into the buffers, after those of their owner were given back to it."""
        owner = self._owner()
        if owner is not None and owner is not cache:
            owner.layers = [{name: state.clone() for name, state in layer.items()} for layer in owner.layers]
            owner.ids = None if owner.ids is None else owner.ids.clone()
        memory = TokenMemory(cache.ids, model.model.embeddings, cache.offset) if self._resona else None
        self._owner, self._lent_length = weakref.ref(cache), 0  # the owner, should only some layers be brought in
        cache.layers = [dict(layer) for layer in cache.layers]
        for index, (mine, theirs) in enumerate(zip(self._states, cache.layers, strict=True)):
            for name, state in mine.items():
                if name == CHUNK_EMBEDDINGS:  # a cache has those alone that are complete in every row
                    complete = self._resona[index].chunk_embeddings(memory, theirs)  # [B, chunks, E]
                    state[:, : complete.shape[1]].copy_(complete)
                    theirs[name] = state[:, : theirs[name].shape[1]]
                elif name in self._growing.get(index, ()):
                    theirs[name] = self._filled(index, name, theirs[name])  # and its own memory is free
                else:
                    theirs[name] = state.copy_(theirs[name])
        if self._ids is not None:
            self._ids[:, : cache.length].copy_(cache.ids)
            self._padding = 0 if cache.offset is None else int(cache.offset.max())
        self._length.fill_(cache.length)
        self._offset.zero_() if cache.offset is None else self._offset.copy_(cache.offset)
        self._lent = [dict(layer) for layer in cache.layers]

    def _lend(self, cache: RecurrentCache) -> None:
        """Let the cache refer to what is filled of the buffers."""
        for index, resona in self._resona.items():
            complete = max(cache.length - self._padding, 0) // resona.chunk_size  # in every row
            if self._lent[index][CHUNK_EMBEDDINGS].shape[1] != complete:
                filled = self._states[index][CHUNK_EMBEDDINGS][:, :complete]  # [B, N, E] -> [B, complete, E]
                self._lent[index][CHUNK_EMBEDDINGS] = cache.layers[index][CHUNK_EMBEDDINGS] = filled
        for index, growing in self._growing.items():
            for name, dim in growing.items():
                filled = self._states[index][name].narrow(dim, 0, cache.length)
                self._lent[index][name] = cache.layers[index][name] = filled
        if self._ids is not None:
            self._lent_ids = cache.ids = self._ids[:, : cache.length]  # [B, C] -> [B, length]
        self._lent_length = cache.length

    def _intact(self, cache: RecurrentCache) -> bool:
        """Whether the cache is as the last step left it: a beam search puts other tensors in their places."""
        owner = self._owner()
        if owner is not cache or cache.length != self._lent_length or cache.ids is not self._lent_ids:
            return False
        return all(
            theirs[name] is state
            for lent, theirs in zip(self._lent, cache.layers, strict=True)
            for name, state in lent.items()
        )


class DecodingGraph(Step):
    """A step that is captured once and then replayed; on a CUDA device, for a model in evaluation mode."""

    def __init__(self, model: RecurrentLM, cache: RecurrentCache) -> None:
        super().__init__(model, cache)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(model.device):
            stream = _capturing_stream(model.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._run(model)
            torch.cuda.current_stream().wait_stream(stream)
            self._replayed = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._replayed, stream=stream):
                self._logits = self._run(model)  # [B, 1, V]

    def _advance(self, model: RecurrentLM) -> Tensor:
        self._replayed.replay()
        return self._logits


@functools.cache
def _capturing_stream(device: torch.device) -> torch.cuda.Stream:
    """One for every capture: cuBLAS keeps a workspace, 32 MB on an H100, for each stream that it has worked on."""
    return torch.cuda.Stream(device)


def capacity_for(length: int) -> int:
    """Tokens that buffers of what grows get room for once a model has seen `length`: about an eighth more."""
    step = max(2 * _LEAST_ROOM, 1 << max(length.bit_length() - 4, 0))
    return ((length + step // 2) // step + 1) * step  # room for half a step at least


def growing_states(mixer: nn.Module) -> dict[str, int]:
    """What a mixer's state gains with each token and can have buffers for, each by the dimension of its tokens."""
    return getattr(mixer.mixer if isinstance(mixer, Resona) else mixer, "growing_states", {})


def can_capture(model: RecurrentLM) -> bool:
    """Whether a step of the model can be captured: no state that grows, but what there are buffers with room for; no
    hook that wants to look."""
    for block in model.model.layers:
        if growing_states(block.mixer):
            continue
        try:
            block.mixer.state_size()
        except ValueError:  # grows with the sequence
            return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def fingerprint(model: RecurrentLM) -> tuple[tuple[int, int], ...]:
    """Where the parameters lie and how often they were changed: a graph is of use as long as both stand."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
