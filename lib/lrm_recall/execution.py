"""Doing runs: one after another in this process, or on Dask workers.

Both ways yield (key, Outcome) the moment a run ends, and turn whatever happens to a run into an Outcome, an
exception or the death of its process too. Nothing here knows what a run computes or where its row goes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrm_recall import provenance

if TYPE_CHECKING:
    from distributed import Client, Future

Run = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its result, or the reason why there is none; how long, and on which machine."""

    result: Mapping[str, Any] | None
    error: str | None
    runtime_s: float
    machine: Mapping[str, Any]


def execute(run: Run, spec: Any) -> Outcome:
    """Call run(spec) in this process. An exception becomes the outcome's error."""
    result, error = None, None
    start = time.perf_counter()
    try:
        result = run(spec)
    except Exception as exception:  # whatever a run does wrong must not stop the other runs
        error = _reason(exception)
    return Outcome(result, error, time.perf_counter() - start, provenance.machine())


def execute_here(run: Run, specs: Mapping[str, Any]) -> Iterator[tuple[str, Outcome]]:
    """Do the runs one after another in this process."""
    for key, spec in specs.items():
        yield key, execute(run, spec)


def execute_on(client: Client, run: Run, specs: Mapping[str, Any]) -> Iterator[tuple[str, Outcome]]:
    """Do the runs on the workers of `client`; yields in the order in which they end.

    A run is handed out when a thread is free for it and not before: one that waits on a worker would be lost
    with it, through no fault of its own.
    """
    from distributed import as_completed

    waiting = iter(specs.items())
    running: dict[Future, str] = {}
    ended = as_completed(loop=client.loop, raise_errors=False)
    while True:
        free = max(1, sum(client.nthreads().values())) - len(running)
        for key, spec in itertools.islice(waiting, max(0, free)):
            future = client.submit(execute, run, spec, pure=False)
            running[future] = key
            ended.add(future)
        if not running:
            return
        future = next(ended)
        key = running.pop(future)
        if future.status == "finished":
            yield key, future.result()
        else:
            yield key, Outcome(None, _loss(future), 0.0, provenance.machine())


@contextlib.contextmanager
def dask_client(workers: int | str) -> Iterator[Client]:
    """A Dask client: of a cluster of its own with `workers` processes, or of the scheduler at an address.

    The local cluster listens on the loopback interface alone, shows no dashboard, gives each worker one
    thread, and dies with this process.

    Raises:
        ConnectionError: when no scheduler answers at the address.
    """
    import dask
    from distributed import Client, LocalCluster

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
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # Dask opens an HTTP port even without a dashboard: any free one
            scheduler_kwargs={"dashboard": False},
            memory_limit=0,  # pausing a worker at a share of the memory helps no training run
            silence_logs=logging.CRITICAL,
            env=one_thread,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _reason(exception: BaseException) -> str:
    """One line: the exception, what it says, and where it was raised."""
    what = " ".join(f"{type(exception).__name__}: {exception}".split())[:500].removesuffix(":")
    frames = traceback.extract_tb(exception.__traceback__)
    return f"{what} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else what


def _loss(future: Future) -> str:
    """Why a run has no outcome of its own: it never returned to `execute`."""
    from distributed import KilledWorker

    if future.status == "cancelled":
        return "lost worker: the connection to the scheduler broke during the run"
    exception = future.exception()
    if isinstance(exception, KilledWorker):
        return "lost worker: the process died during the run (killed, out of memory, or crashed)"
    return _reason(exception)
