"""A Resona layer's retrieval on a stream of its own, beside the layer's mixer: in a CUDA graph, two branches.

Within one token the retrieval needs the layer's input and nothing of its mixer. `Resona.forward` runs the mixer first,
so where its input was ready has to be remembered (`beside`, which the decoding step opens) until the retrieval is
launched (`branch`, which the adapter of its kernels opens). Outside `beside`, and on a CPU, `branch` does nothing.

Main is the stream on which the model runs, side the one of the retrievals. Why nothing is read too early, or
overwritten too early by memory that the caching allocator hands out again, which it does within one stream only:
    x, from main's memory           the layer's caller holds it until `branch` is closed; main has waited by then for
                                    all that reads it on side, so whoever gets the memory next on main comes later
    what was retrieved, from side's main reads it while mixing, after the join. Side's next allocation is in the next
                                    layer, which waits for an event that main records after that mixing was launched
    the table of chunk embeddings   read and written on side alone while `beside` is open
    ids, length, offset, weights    no tensor of one call: they stay, and change on main outside `beside` or, the ids,
                                    before the first layer. Main waits for all of side when `beside` is closed
In a capture side joins by waiting for main's event, before anything is allocated on it, so that all of its memory is
the graph's own; and the wait at the end is what lets the capture end.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class _Fork:
    """What is known of one layer: the stream that its mixer is on, the event after which its input is there, the stream
    that its retrieval is on."""

    main: torch.cuda.Stream | None = None
    ready: torch.cuda.Event | None = None
    side: torch.cuda.Stream | None = None

    def mark(self, mixer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before the mixer launches anything."""
        if inputs[0].is_cuda:
            self.main = torch.cuda.current_stream(inputs[0].device)
            self.ready = self.main.record_event()


_forks: dict[nn.Module, _Fork] = {}  # of the layers of every `beside` that is open


@contextlib.contextmanager
def beside(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let the retrievals of these Resona layers run beside their mixers; closed, all that they do lies behind.

    However it is left, the mixers are without a hook again and the side stream is part of no capture.
    """
    forks = {layer: _Fork() for layer in layers}
    with contextlib.ExitStack() as stack:
        stack.callback(_join, forks)  # last: where a capture has failed it raises, too
        for layer, fork in forks.items():
            stack.callback(layer.mixer.register_forward_pre_hook(fork.mark).remove)
        _forks.update(forks)
        yield


def _join(forks: dict[nn.Module, _Fork]) -> None:
    for layer in forks:
        _forks.pop(layer, None)
    for side in {fork.side for fork in forks.values()} - {None}:  # a stream that took no part must not enter a capture
        torch.cuda.current_stream(side.device).wait_stream(side)


@contextlib.contextmanager
def branch(layer: nn.Module) -> Iterator[Callable[[], None]]:
    """Launch what is inside on the side stream, from where the layer's input was ready.

    Gives the function that makes the mixer's stream wait for what was launched inside so far. Where no event was
    recorded everything stays on one stream, and the function does nothing.
    """
    fork = _forks.get(layer)
    if fork is None or fork.ready is None:
        yield lambda: None
        return
    side = _side_stream(fork.main.device)
    side.wait_event(fork.ready)
    fork.ready, fork.side = None, side
    with torch.cuda.stream(side):
        yield lambda: fork.main.wait_event(side.record_event())


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all models of a device: the caching allocator keeps memory for each stream that was allocated on."""
    return torch.cuda.Stream(device)
