"""Doing runs: one after another in this process, or on Dask workers.

Both ways yield (key, Outcome) the moment a run ends, and turn whatever happens to a run into an Outcome, an
exception or the death of its process too. Nothing here knows what a run computes or where its row goes.

On a CPU every worker is a process of one thread. On GPUs there is one process for each, with as many threads as runs
are to share it: kernels of several threads run side by side, those of several processes take turns.

An exception with a true attribute `breaks_process` says that its process can do no further run. A worker then ends
itself, and Dask starts another in its place.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrm_recall import provenance

if TYPE_CHECKING:
    from distributed import Client, Future, SpecCluster

Run = Callable[[Any], Mapping[str, Any]]

_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
_QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # hardware queues of a GPU: by default 8 streams run side by side
_MOST_ON_A_GPU = 32  # the streams that torch has


class SchedulerLost(ConnectionError):
    """The Dask scheduler has gone away; what became of the runs that it had in hand, nobody knows."""


class BrokenProcess(RuntimeError):
    """A run has left this process unable to do another one, as an illegal access on a GPU does."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its result, or the reason why there is none; how long, and on which machine.

    `broken` says that its process can do no further run.
    """

    result: Mapping[str, Any] | None
    error: str | None
    runtime_s: float
    machine: Mapping[str, Any]
    broken: bool = False


def execute(run: Run, spec: Any) -> Outcome:
    """Call run(spec) in this process. An exception becomes the outcome's error."""
    result, error, broken = None, None, False
    start = time.perf_counter()
    try:
        result = run(spec)
    except Exception as exception:  # whatever a run does wrong must not stop the other runs
        error, broken = _reason(exception), bool(getattr(exception, "breaks_process", False))
    return Outcome(result, error, time.perf_counter() - start, provenance.machine(), broken)


def execute_here(run: Run, specs: Mapping[str, Any]) -> Iterator[tuple[str, Outcome]]:
    """Do the runs one after another in this process.

    Raises:
        BrokenProcess: a run has left the process unable to go on; its outcome was yielded before.
    """
    for key, spec in specs.items():
        outcome = execute(run, spec)
        yield key, outcome
        if outcome.broken:
            raise BrokenProcess(f"this process can do no further run, start it again to go on: {outcome.error}")


def execute_on(client: Client, run: Run, specs: Mapping[str, Any]) -> Iterator[tuple[str, Outcome]]:
    """Do the runs on the workers of `client`; yields in the order in which they end.

    `specs` is a mapping, or anything whose `items` gives those that can be done now and have not been given. A run is
    handed out when a thread is free for it and not before: one that waits on a worker would be lost with it, through
    no fault of its own. Runs that are lost together with the process that they shared are done once more, after all
    others and one at a time, so that the one to blame is found and the others are not.

    Raises:
        SchedulerLost: the scheduler goes away.
    """
    from distributed import as_completed

    waiting = iter(specs.items()) if isinstance(specs, Mapping) else None
    again: deque[tuple[str, Any]] = deque()
    running: dict[Future, tuple[str, Any, bool]] = {}  # key, description, whether others share its process
    ended = as_completed(loop=client.loop, raise_errors=False)

    def hand_out(key: str, spec: Any, shared: bool) -> None:
        future = client.submit(_execute_on_worker, run, spec, pure=False)
        running[future] = key, spec, shared
        ended.add(future)

    while True:
        threads = client.nthreads().values()
        free = max(1, sum(threads)) - len(running)
        for key, spec in itertools.islice(waiting or specs.items(), max(0, free)):
            hand_out(key, spec, shared=max(threads, default=1) > 1)
        if not running and again:
            hand_out(*again.popleft(), shared=False)
        if not running:
            return
        future = next(ended)
        key, spec, shared = running.pop(future)
        if future.status == "cancelled":
            raise SchedulerLost("the connection to the Dask scheduler broke; start again to do what is missing")
        if future.status == "finished":
            yield key, future.result()
        elif shared:
            again.append((key, spec))
        else:
            yield key, Outcome(None, _loss(future), 0.0, provenance.machine())


@contextlib.contextmanager
def dask_client(workers: int | str, device: str = "cpu") -> Iterator[Client]:
    """A Dask client: of a cluster of its own, or of the scheduler at an address.

    The local cluster listens on the loopback interface alone, shows no dashboard, and dies with this process.

    Args:
        workers: runs at a time, on a GPU those that share it; or a scheduler's address.
        device: where the runs of a local cluster work: "cpu"; "cuda" for every GPU that this process may use, of which
            each worker sees its own alone; or one of them, such as "cuda:1".

    Raises:
        ValueError: more runs on one GPU than torch has streams, or no GPU.
        ConnectionError: when no scheduler answers at the address.
    """
    import dask
    from distributed import Client

    if isinstance(workers, str):
        try:
            client = Client(workers, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ConnectionError(f"no Dask scheduler answers at {workers!r}: {error}") from None
        with client:
            yield client
        return
    settings = {
        "distributed.scheduler.allowed-failures": 0,  # a run that kills its worker would kill the next
        "distributed.nanny.pre-spawn-environ": {},  # Dask would set these in our own environment
    }
    with (
        dask.config.set(settings),
        _local_cluster(_crew(workers, device)) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def in_one_process(workers: int, device: str) -> bool:
    """Whether runs can be done right here: one at a time, and not on several GPUs."""
    return workers == 1 and (device != "cuda" or len(gpus()) <= 1)


def gpus() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = torch.cuda.device_count()
    return named.split(",")[:found] if named else [str(index) for index in range(found)]


def _crew(workers: int, device: str) -> list[dict[str, Any]]:
    """Options of each worker process of a local cluster."""
    if device.partition(":")[0] != "cuda":
        return [{"nthreads": 1, "env": _ONE_THREAD}] * workers
    if workers > _MOST_ON_A_GPU:
        raise ValueError(f"at most {_MOST_ON_A_GPU} runs can share a GPU, got workers={workers}")
    seen = [{}] if ":" in device else [{"CUDA_VISIBLE_DEVICES": name} for name in gpus()]
    if not seen:
        raise ValueError("there is no GPU for device 'cuda'")
    return [{"nthreads": workers, "env": _ONE_THREAD | _QUEUES | own} for own in seen]


def _local_cluster(crew: list[dict[str, Any]]) -> SpecCluster:
    """A cluster on this machine, its workers as `crew` describes them; those of a LocalCluster would be all alike."""
    from distributed import Nanny, Scheduler, SpecCluster

    loopback = {"host": "127.0.0.1", "protocol": "tcp://", "dashboard": False}
    any_port = "127.0.0.1:0"  # Dask opens an HTTP port even without a dashboard
    shared = {**loopback, "memory_limit": 0, "silence_logs": logging.CRITICAL}  # pausing a worker helps no training run
    return SpecCluster(
        scheduler={"cls": Scheduler, "options": {**loopback, "dashboard_address": any_port}},
        workers={index: {"cls": Nanny, "options": {**shared, **options}} for index, options in enumerate(crew)},
        silence_logs=logging.CRITICAL,
    )


def _execute_on_worker(run: Run, spec: Any) -> Outcome:
    """`execute` in a worker process, which ends itself when it can do no further run."""
    outcome = execute(run, spec)
    if outcome.broken:
        print(f"a worker process ends: {outcome.error}", file=sys.stderr, flush=True)
        os._exit(1)  # a thread of Dask cannot end its process in any gentler way
    return outcome


def _reason(exception: BaseException) -> str:
    """One line: the exception, what it says, and where it was raised."""
    what = " ".join(f"{type(exception).__name__}: {exception}".split())[:500].removesuffix(":")
    frames = traceback.extract_tb(exception.__traceback__)
    return f"{what} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else what


def _loss(future: Future) -> str:
    """Why a run has no outcome of its own: it never returned to `execute`."""
    from distributed import KilledWorker

    exception = future.exception()
    if isinstance(exception, KilledWorker):
        return "lost worker: the process died during the run (killed, out of memory, or crashed)"
    return _reason(exception)
