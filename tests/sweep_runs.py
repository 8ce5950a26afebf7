"""Quick runs for the tests of sweeps, in a module that workers can import; `main` is a sweep to be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

import psutil

from lrm_recall.results import ResultStore
from lrm_recall.sweep import Experiment, run_sweep


@dataclass(frozen=True)
class QuickRun:
    """What a run does: sleep, then `behaviour`. Its start, with the process id, is appended to `log`."""

    seed: int
    behaviour: str = "ok"
    sleep_s: float = 0.0
    log: str = ""


def quick_run(run: QuickRun) -> dict:
    if run.log:
        with open(run.log, "a") as log:  # one short write: whole even with many writers
            log.write(f"{run.seed} {os.getpid()}\n")
    time.sleep(run.sleep_s)
    if run.behaviour == "raise":
        raise RuntimeError("no such luck")
    if run.behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    value = float("nan") if run.behaviour == "nan" else run.seed * 2.0
    return {"metrics": {"accuracy": value}, "history": [{"epoch": epoch} for epoch in range(200)]}


def forgets_metrics(run: QuickRun) -> dict:
    return {"accuracy": 1.0}


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def experiment(run=quick_run, cost=None) -> Experiment:
    data = {"source": "none", "revision": "1"}
    return Experiment("quick", run, data, modules=lambda spec: ["lrm_recall.rows"], cost=cost)


def main() -> None:
    """Arguments: store, log, number of runs, workers. Prints the seed of each row once it is stored."""
    store, log, count, workers = sys.argv[1:]
    specs = [QuickRun(seed, sleep_s=0.004, log=log) for seed in range(int(count))]
    run_sweep(
        specs,
        experiment(),
        ResultStore(store),
        profile="smoke",
        workers=int(workers),
        progress=False,
        on_row=lambda row: print(row["seed"], flush=True),
    )
