"""Sweeps that are killed, lose their workers, their scheduler or their disk, or share a store.

What was reported as stored stays, and is never computed again; what was not is missing, and can be done again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_runs import QuickRun, alive, experiment

from lrm_recall.results import ResultStore
from lrm_recall.rows import run_key
from lrm_recall.sweep import run_sweep

_HERE = Path(__file__).parent
_RUNS = 900


_HALF_A_WRITE = """
import os, signal
from lrm_recall import results
write = os.write
def dies(file, line):
    write(file, line[: len(line) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
results.os.write = dies
"""


def _python(code: str, *arguments: object) -> subprocess.Popen:
    """A real process; `-c`, so that workers do not import a main script."""
    path = os.pathsep.join([str(_HERE), str(_HERE.parent / "lib"), str(_HERE.parent / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def _start(store: Path, log: Path, workers: int, first: str = "") -> subprocess.Popen:
    """A process that does a sweep of _RUNS short runs."""
    return _python(f"{first}\nimport sweep_runs\nsweep_runs.main()", store, log, _RUNS, workers)


def _starts(log: Path) -> list[tuple[int, int]]:
    """(seed, process) of every run that was begun, in order."""
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.filterwarnings("ignore:.*cut off in the middle")
def test_twenty_kills_lose_nothing_and_repeat_nothing(tmp_path):
    store, log = ResultStore(tmp_path / "quick.smoke.jsonl"), tmp_path / "log"
    chance = random.Random(0)
    reported: set[int] = set()
    for kill in range(20):
        workers = 2 if kill % 5 == 4 else 1
        before = len(_starts(log))
        process = _start(store.path, log, workers)
        early = kill % 7 == 6  # some die while they start, the others in the middle of their work
        seen = [] if early else [process.stdout.readline()]
        time.sleep(chance.uniform(0, 0.6 if early else 0.15))
        process.send_signal(signal.SIGKILL)
        seen += process.stdout.read().splitlines(keepends=True)
        assert process.wait() == -signal.SIGKILL
        begun = {seed for seed, _ in _starts(log)[before:]}
        assert not begun & reported, "computed again although it was stored"
        reported |= {int(line) for line in seen if line.endswith("\n")}
        rows = store.rows()
        assert reported <= {row["seed"] for row in rows}, "lost although it was reported as stored"
        for row in rows:
            assert row["metrics"] == {"accuracy": row["seed"] * 2.0} and len(row["history"]) == 200
            content = (row["experiment"], row["config"], row["seed"], row["data"]["revision"], row["code"])
            assert row["key"] == run_key(*content)
    assert 20 <= len(reported) < _RUNS, "the kills came too early or too late to show anything"

    missing = set(range(_RUNS)) - {row["seed"] for row in store.rows()}
    before = len(_starts(log))
    process = _start(store.path, log, 1)
    seen = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert sorted(seed for seed, _ in _starts(log)[before:]) == sorted(missing)
    assert sorted(map(int, seen.split())) == sorted(missing)
    assert len(store.rows()) == _RUNS == len({row["seed"] for row in store.rows()})


def test_a_kill_in_the_middle_of_a_write_is_repaired(tmp_path):
    store, log = ResultStore(tmp_path / "quick.smoke.jsonl"), tmp_path / "log"
    process = _start(store.path, log, 1, _HALF_A_WRITE)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == -signal.SIGKILL
    torn = store.path.read_bytes()
    assert torn.startswith(b'{"key":') and b"\n" not in torn and store.rows() == []
    with pytest.warns(UserWarning, match="cut off in the middle"):
        run_sweep([QuickRun(0)], experiment(), store, profile="smoke", progress=False)
    assert [row["seed"] for row in store.rows()] == [0]
    assert store.path.with_name("quick.smoke.jsonl.torn").read_bytes() == torn + b"\n"


def test_workers_die_with_their_sweep(tmp_path):
    store, log = tmp_path / "quick.smoke.jsonl", tmp_path / "log"
    process = _start(store, log, 2)
    while len({worker for _, worker in _starts(log)}) < 2:
        process.stdout.readline()
    workers = {worker for _, worker in _starts(log)}
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers)), f"workers {workers} outlived their sweep"
    process.stdout.close()


# --- one at a time, other things are killed than the sweep itself


_SWEEP = """
import sys
from pathlib import Path
import sweep_runs
from lrm_recall.results import ResultStore
from lrm_recall.sweep import run_sweep
store, log, count, workers, seconds = sys.argv[1:]
specs = [sweep_runs.QuickRun(seed, sleep_s=float(seconds), log=log) for seed in range(int(count))]
rows = run_sweep(specs, sweep_runs.experiment(), ResultStore(store), profile="smoke", progress=False,
                 workers=int(workers) if workers.isdecimal() else workers,
                 on_row=lambda row: print(row["seed"], flush=True))
print("all", sum(row["status"] == "ok" for row in rows))
"""


def _sweep(store: Path, log: Path, count: int, workers: int | str, seconds: float, first: str = "") -> subprocess.Popen:
    """A process that sweeps `count` runs of `seconds` each; it prints seeds, and at the end how many rows are ok."""
    return _python(f"{first}\n{_SWEEP}", store, log, count, workers, seconds)


def _until(true, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_a_killed_worker_costs_its_own_run_alone(tmp_path):
    store, log = ResultStore(tmp_path / "quick.smoke.jsonl"), tmp_path / "log"
    process = _sweep(store.path, log, 12, 2, 0.15)
    _until(lambda: len(_starts(log)) >= 4)
    seed, worker = _starts(log)[-1]
    os.kill(worker, signal.SIGKILL)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "all 11" and process.returncode == 0
    (failed,) = store.failures()
    assert failed["seed"] == seed and failed["error"].startswith("lost worker: the process died during the run")
    assert sorted(each for each, _ in _starts(log)) == list(range(12)), "a run was lost, or done twice"
    rows = run_sweep([QuickRun(seed, sleep_s=0.15, log=str(log))], experiment(), store, profile="smoke", progress=False,
                     retry_failed=True)  # fmt: skip
    assert rows[0]["status"] == "ok" and store.failures() == []


def test_a_killed_scheduler_ends_the_sweep_and_blames_no_run(tmp_path):
    store, log = ResultStore(tmp_path / "quick.smoke.jsonl"), tmp_path / "log"
    port_file = tmp_path / "scheduler.json"
    scheduler = _python("from distributed.cli.dask_scheduler import main; main()", "--host", "127.0.0.1",
                        "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", port_file)  # fmt: skip
    worker = None
    try:
        _until(port_file.exists)
        address = json.loads(port_file.read_text())["address"]
        worker = _python("from distributed.cli.dask_worker import main; main()", address, "--nthreads", "1",
                         "--no-dashboard", "--no-nanny", "--death-timeout", "60")  # fmt: skip
        soon = "import dask; dask.config.set({'distributed.comm.timeouts.connect': '1s'})"  # not after 30 s
        process = _sweep(store.path, log, 200, address, 0.05, first=soon)
        seen = [process.stdout.readline() for _ in range(5)]
        scheduler.kill()
        told, error = process.communicate(timeout=60)
        assert process.returncode == 1 and "SchedulerLost" in error.splitlines()[-1]
    finally:
        for each in filter(None, (scheduler, worker)):
            each.kill()
            each.communicate()
    reported = {int(line) for line in [*seen, *told.splitlines(keepends=True)]}
    assert {row["seed"] for row in store.rows()} == reported and len(reported) < 200
    assert store.failures() == [], "the runs are not to blame"
    before = len(_starts(log))
    specs = [QuickRun(seed, sleep_s=0.05, log=str(log)) for seed in range(len(reported) + 3)]
    run_sweep(specs, experiment(), store, profile="smoke", progress=False)
    assert {seed for seed, _ in _starts(log)[before:]} == set(range(len(specs))) - reported


_LITTLE_ROOM = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"


@pytest.fixture
def full_disk(tmp_path) -> Iterator[Path]:
    """A folder with room for 40 kB: a file system of its own, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _no_room_left(store: ResultStore, log: Path, workers: int, first: str) -> None:
    """Sweep until the disk is full: an error that says so, and whole rows, those that were reported."""
    process = _sweep(store.path, log, 60, workers, 0.0, first)
    told, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith("OSError: [Errno "), error
    assert store.path.read_bytes().endswith(b"}\n") and store.path.stat().st_size <= 40_960
    assert [row["seed"] for row in store.rows()] == [int(line) for line in told.splitlines()]
    assert 2 < len(store.rows()) < 60 and store.failures() == []
    assert not store.path.with_name("quick.smoke.jsonl.claims").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_may_not_grow_stops_the_sweep_and_keeps_whole_rows(tmp_path, workers):
    store, log = ResultStore(tmp_path / "quick.smoke.jsonl"), tmp_path / "log"
    _no_room_left(store, log, workers, _LITTLE_ROOM)
    before, stored = len(_starts(log)), {row["seed"] for row in store.rows()}
    specs = [QuickRun(seed, log=str(log)) for seed in range(60)]
    run_sweep(specs, experiment(), store, profile="smoke", progress=False)  # there is room again
    assert {seed for seed, _ in _starts(log)[before:]} == set(range(60)) - stored
    assert len(store.rows()) == 60


def test_a_full_disk_stops_the_sweep_and_keeps_whole_rows(full_disk, tmp_path):
    store, log = ResultStore(full_disk / "quick.smoke.jsonl"), tmp_path / "log"
    _no_room_left(store, log, 1, "")
    rows = store.rows()
    with pytest.raises(OSError, match="No space left on device|bytes fit on the disk"):
        run_sweep([QuickRun(99)], experiment(), store, profile="smoke", progress=False)
    assert store.rows() == rows


# --- two sweeps on one store


@pytest.mark.parametrize("workers", [1, 2])
def test_two_sweeps_on_one_store_share_the_work(tmp_path, workers):
    store, log = ResultStore(tmp_path / "quick.smoke.jsonl"), tmp_path / "log"
    both = [_sweep(store.path, log, 40, workers, 0.03) for _ in range(2)]
    told = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [lines[-1] for lines in told] == ["all 40", "all 40"], "each waits for what the other has in hand"
    assert sorted(seed for seed, _ in _starts(log)) == list(range(40)), "a run was lost, or done twice"
    assert sorted(int(seed) for lines in told for seed in lines[:-1]) == list(range(40))
    assert len(store.path.read_text().splitlines()) == 40
    assert not store.path.with_name("quick.smoke.jsonl.claims").exists()


def test_what_a_killed_sweep_had_in_hand_another_one_does(tmp_path):
    store, log = ResultStore(tmp_path / "quick.smoke.jsonl"), tmp_path / "log"
    victim = _sweep(store.path, log, 3, 1, 3.0)
    _until(lambda: len(_starts(log)) == 1)
    other = _sweep(store.path, log, 3, 1, 0.0)  # other descriptions, so other runs: they are not kept waiting
    assert other.communicate(timeout=60)[0].splitlines()[-1] == "all 3"
    same = _sweep(store.path, log, 1, 1, 3.0)
    time.sleep(1.0)
    assert same.poll() is None and len(_starts(log)) == 4, "the run that the victim has in hand was begun twice"
    victim.kill()
    victim.communicate()
    assert same.communicate(timeout=60)[0].splitlines() == ["0", "all 1"]
    assert len(_starts(log)) == 5 and len(store.rows()) == 4
