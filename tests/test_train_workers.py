"""Workers whose threads share a process: what is lost together is tried once more, alone.

Every worker that is started imports this module, so it imports little.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import dask
import pytest

from lrm_recall import execution
from lrm_recall.execution import BrokenProcess, execute_here, execute_on, in_one_process


@dataclass(frozen=True)
class Run:
    seed: int
    behaviour: str = "ok"


class DeviceLost(RuntimeError):
    breaks_process = True


def act(run: Run) -> dict:
    if run.behaviour == "die":
        os._exit(1)
    if run.behaviour == "break":
        raise DeviceLost("no more")
    return {"metrics": {"process": os.getpid()}}


def shared_client(threads: int):
    """A cluster of one process."""
    from distributed import Client

    stack = contextlib.ExitStack()
    stack.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": 0}))
    cluster = stack.enter_context(execution._local_cluster([{"nthreads": threads, "env": {}}]))
    return stack, stack.enter_context(Client(cluster, set_as_default=False))


def test_only_the_run_to_blame_is_lost():
    runs = {"a": Run(0), "b": Run(1, "die"), "c": Run(2), "d": Run(3, "break"), "e": Run(4)}
    stack, client = shared_client(3)
    with stack:
        outcomes = dict(execute_on(client, act, runs))
    assert outcomes.keys() == runs.keys()
    assert {key for key, outcome in outcomes.items() if outcome.error} == {"b", "d"}
    assert all(outcomes[key].error.startswith("lost worker: the process died") for key in "bd")


def test_a_broken_process_stops_what_runs_here():
    done = []
    with pytest.raises(BrokenProcess, match="start it again to go on: DeviceLost: no more"):
        for key, outcome in execute_here(act, {"a": Run(0), "b": Run(1, "break"), "c": Run(2)}):
            done.append((key, outcome.error is None, outcome.broken))
    assert done == [("a", True, False), ("b", False, True)]


def test_a_crew_on_gpus_is_a_process_for_each(monkeypatch):
    monkeypatch.setattr(execution, "gpus", lambda: ["2", "GPU-5ef"])
    crew = execution._crew(6, "cuda")
    assert [worker["nthreads"] for worker in crew] == [6, 6]
    assert [worker["env"]["CUDA_VISIBLE_DEVICES"] for worker in crew] == ["2", "GPU-5ef"]
    (one,) = execution._crew(6, "cuda:1")  # its index counts among all of them
    assert one["nthreads"] == 6 and "CUDA_VISIBLE_DEVICES" not in one["env"]
    assert [worker["nthreads"] for worker in execution._crew(3, "cpu")] == [1, 1, 1]
    assert not in_one_process(1, "cuda") and not in_one_process(2, "cuda:0")
    assert in_one_process(1, "cpu") and in_one_process(1, "cuda:1")


def test_what_no_gpu_can_take_is_refused(monkeypatch):
    monkeypatch.setattr(execution, "gpus", lambda: [])
    with pytest.raises(ValueError, match="there is no GPU for device 'cuda'"), execution.dask_client(2, "cuda"):
        pass
    with pytest.raises(ValueError, match="at most 32 runs can share a GPU, got workers=33"):
        execution._crew(33, "cuda:0")


@pytest.mark.parametrize(("named", "found", "expected"), [(None, 2, ["0", "1"]), ("3,1", 2, ["3", "1"]), ("", 0, [])])
def test_gpus_are_named_as_cuda_names_them(monkeypatch, named, found, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert execution.gpus() == expected
