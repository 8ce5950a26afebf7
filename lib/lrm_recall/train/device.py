"""Where runs train: whether a device is there, and how threads share it.

One GPU trains many small models at once, each in a thread of one process: processes would take turns. Every thread has
a stream of its own. Replaying a captured step is all that threads do side by side; for the rest they take turns, since
Triton's autotuner is not made for several. While one of them captures, the others do not even start a replay: torch
keeps one random state for the whole process, and refuses a replay while that takes part in a capture.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch


class Gate:
    """Any number of threads may pass at a time, or one may close it for a while."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passing, self._closed = 0, False

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Wait until nobody has closed the gate, and keep it from being closed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._passing += 1
        try:
            yield
        finally:
            with self._changed:
                self._passing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Let nobody in, and wait until all are through."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: not self._passing)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


replays = Gate()  # closed while a thread captures
_turn = threading.RLock()
_of_thread = threading.local()


def usable_device(name: str) -> str:
    """`name`, if tensors can be made there.

    Raises:
        ValueError: no such device on this machine.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        allowed = ["cpu", *([found.type] if found else [])]
        raise ValueError(f"device {name!r} is not available here; allowed: {', '.join(allowed)}") from None
    return name


class DeviceLostError(RuntimeError):
    """A kernel has failed in a way that leaves the GPU of no use to this process; sweeps then start another one."""

    breaks_process = True


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work on this thread's own stream of a GPU; on a CPU there is nothing to do.

    A thread keeps its stream: torch hands out 32 in turn, and two runs on one stream would end up in one capture.

    Raises:
        DeviceLostError: the work has raised, and the GPU does nothing any more.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream, outer = _stream(), torch.cuda.current_stream()
        stream.wait_stream(outer)
        try:
            with torch.cuda.stream(stream):
                yield
            outer.wait_stream(stream)
        except Exception as error:
            if not _alive(stream):
                text = f"the GPU is lost to this process after {type(error).__name__}: {error}"
                raise DeviceLostError(text) from error
            raise


@contextlib.contextmanager
def turn(precision: str) -> Iterator[None]:
    """Have the process's GPUs to oneself for eager work, with fp32 matrix products as `precision` says."""
    with _turn:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _stream() -> torch.cuda.Stream:
    """This thread's stream of the current GPU."""
    streams = _of_thread.__dict__.setdefault("streams", {})
    index = torch.cuda.current_device()
    if index not in streams:
        streams[index] = torch.cuda.Stream()
    return streams[index]


def _alive(stream: torch.cuda.Stream) -> bool:
    """Whether the GPU still answers; after an illegal access every later call fails."""
    try:
        stream.synchronize()
    except RuntimeError:
        return False
    return True
