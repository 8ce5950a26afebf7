"""One decoding step as one CUDA graph.

A step of a 1.3B model reads 2.7 GB of weights in about a millisecond, and launching its several hundred kernels from
Python takes forty. Where every state is of constant size the whole step can be captured once and replayed with one
launch. The graph owns its buffers; the cache that is being decoded refers to them. When another cache is decoded, its
states are copied in, and the cache that had them gets copies of its own.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrm_recall.cache import RecurrentCache
from lrm_recall.ops.linear import project

if TYPE_CHECKING:
    from lrm_recall.model import RecurrentLM

_WARM_UP = 2  # steps before the capture: kernels are compiled and workspaces allocated in the first


class Decoder:
    """Decodes the caches of one model, each token through a graph where the model allows it.

    A copy of a model gets a Decoder that has captured nothing yet.
    """

    def __init__(self) -> None:
        self._graph: DecodingGraph | None = None
        self._cache: weakref.ref[RecurrentCache] | None = None  # the one whose steps were decided upon last

    def __deepcopy__(self, memo: dict) -> Decoder:
        return Decoder()

    def __reduce__(self) -> tuple:
        return Decoder, ()

    def step(self, model: RecurrentLM, ids: Tensor, cache: RecurrentCache) -> Tensor | None:
        """Logits [B, 1, V] behind the tokens ids [B, 1], the cache moved on; None where the model has to be run."""
        if ids.shape[1] != 1 or not ids.is_cuda or not cache.length or model.training or torch.is_grad_enabled():
            return None
        if torch.cuda.is_current_stream_capturing():
            return None
        rows = next((state.shape[0] for state in cache.layers[0].values()), None)
        if rows != ids.shape[0]:
            return None  # the model says what is wrong
        resized = self._graph is not None and self._graph.rows != rows  # as by reorder_cache
        if self._cache is None or self._cache() is not cache or resized:  # nobody changes a model between two tokens
            self._cache = weakref.ref(cache)
            if not can_capture(model):
                self._graph = None
            elif self._graph is None or not self._graph.fits(model, rows):
                self._graph = None  # before another is captured, for its memory
                self._graph = DecodingGraph(model, cache)
        return None if self._graph is None else self._graph.step(ids, cache)


class DecodingGraph:
    """The captured step of one model for one batch size.

    Args:
        model: in evaluation mode on a CUDA device, one that `can_capture` accepts.
        cache: one that the model returned for a batch of that size; it is read, not changed.
    """

    def __init__(self, model: RecurrentLM, cache: RecurrentCache) -> None:
        self._fingerprint = fingerprint(model)
        self._owner: weakref.ref[RecurrentCache] | None = None  # the cache that refers to the buffers
        device = model.device
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            self._states = [{name: state.clone() for name, state in layer.items()} for layer in cache.layers]
            batch = next(iter(self._states[0].values())).shape[0]
            self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # [B, 1]
            self._length = torch.zeros((), dtype=torch.int64, device=device)
            self._offset = torch.zeros(batch, dtype=torch.int64, device=device)  # [B]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._run(model)
            torch.cuda.current_stream().wait_stream(stream)
            self._replayed = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._replayed):
                self._logits = self._run(model)  # [B, 1, V]

    def _run(self, model: RecurrentLM) -> Tensor:
        """Run the model on the buffers and leave the new states in them."""
        cache = RecurrentCache(len(self._states))
        cache.layers = [dict(layer) for layer in self._states]
        cache.length, cache.offset = self._length, self._offset
        outputs = model.model(input_ids=self._ids, past_key_values=cache)
        for layer, new in zip(self._states, cache.layers, strict=True):
            for name, state in layer.items():
                if new[name].data_ptr() != state.data_ptr():  # some kernels change their state in place
                    state.copy_(new[name])
        self._length.add_(1)
        return project(outputs.last_hidden_state, model.lm_head)[0]

    @property
    def rows(self) -> int:
        """Sequences that a step decodes, B."""
        return self._ids.shape[0]

    def step(self, ids: Tensor, cache: RecurrentCache) -> Tensor:
        """Logits [B, 1, V] behind the tokens ids [B, 1]; the cache moves on by one position."""
        owner = self._owner() if self._owner is not None else None
        if owner is not cache or not self._intact(cache):
            self._take(cache, owner)
        self._ids.copy_(ids)
        self._replayed.replay()
        cache.length += 1
        return self._logits.clone()

    def _take(self, cache: RecurrentCache, owner: RecurrentCache | None) -> None:
        """Bring the states of a cache into the buffers, after those of their owner were given back to it."""
        if owner is not None and owner is not cache:
            owner.layers = [{name: state.clone() for name, state in layer.items()} for layer in owner.layers]
        for mine, theirs in zip(self._states, cache.layers, strict=True):
            for name, state in mine.items():
                state.copy_(theirs[name])
        cache.layers = [dict(layer) for layer in self._states]
        self._length.fill_(cache.length)
        self._offset.zero_() if cache.offset is None else self._offset.copy_(cache.offset)
        self._owner = weakref.ref(cache)

    def fits(self, model: RecurrentLM, rows: int) -> bool:
        """Whether this still is the step of the model, for a batch of this size."""
        return rows == self.rows and self._fingerprint == fingerprint(model)

    def _intact(self, cache: RecurrentCache) -> bool:
        """Whether nobody put other tensors in the place of the buffers, as a beam search does."""
        return all(
            theirs[name] is state
            for mine, theirs in zip(self._states, cache.layers, strict=True)
            for name, state in mine.items()
        )


def can_capture(model: RecurrentLM) -> bool:
    """Whether a step of the model can be captured: no state that grows, no retrieval, no hook that wants to look on."""
    if model.config.resona_layers:
        return False
    try:
        model.state_size()
    except ValueError:  # grows with the sequence
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def fingerprint(model: RecurrentLM) -> tuple[tuple[int, int], ...]:
    """Where the parameters lie and how often they were changed: a graph is of use as long as both stand."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
