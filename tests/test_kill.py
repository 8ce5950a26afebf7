"""A sweep killed at random moments: what was reported as stored stays, and is never computed again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
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


def _start(store: Path, log: Path, workers: int, first: str = "") -> subprocess.Popen:
    """A real process that does a real sweep; `-c`, so that workers do not import a main script."""
    code = f"{first}\nimport sweep_runs\nsweep_runs.main()"
    path = os.pathsep.join([str(_HERE), str(_HERE.parent / "lib"), str(_HERE.parent / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-c", code, store, log, str(_RUNS), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


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
