"""Compiling the kernels of a sweep before its runs, side by side.

On a GPU the threads of a process take turns at whatever compiles (`lrm_recall.train.device`), and a sweep of small
models has new shapes in every other run: then runs wait for one core, and the GPU with them. Here each kind of run does
one step in one of many processes. Triton keeps on disk what they compile, and the runs find it there.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing.queues import Queue
from typing import Any

import torch
from tqdm import tqdm

from lrm_recall.execution import execute
from lrm_recall.train.mad import MADRun
from lrm_recall.train.synthetic import MQARRun

Run = MQARRun | MADRun

_SCORED = 16  # examples of validation and of the test: their batches are filled up to the size of training's


def short_runs(runs: Iterable[Run]) -> list[Run]:
    """A run of one step for every kind of run that may compile kernels of its own; rates and seeds make no kind."""
    found: dict[str, Run] = {}
    for run in map(_shortened, runs):
        found.setdefault(repr(run), run)
    return list(found.values())


def compile_ahead(
    runs: Iterable[Run], do: Callable[[Run], Any], *, processes: int, gpus: Sequence[str], show: bool = True
) -> list[str]:
    """Do a short run of every kind, in as many processes, which share the GPUs evenly.

    Args:
        runs: what will be trained afterwards.
        do: does one of them, such as `functools.partial(run_mqar, device="cuda")`; importable by another process.
        processes: how many at a time; each takes one core, and of a GPU what a run takes.
        gpus: names for CUDA_VISIBLE_DEVICES.
        show: print a bar.

    Returns:
        What went wrong, one line a kind; the sweep will say so again, of each run.
    """
    short = short_runs(runs)
    context = multiprocessing.get_context("spawn")
    names = context.Queue()
    processes = max(1, min(processes, len(short)))
    for index in range(processes):
        names.put(gpus[index % len(gpus)])
    errors = []
    with ProcessPoolExecutor(processes, context, initializer=_take_gpu, initargs=(names,)) as pool:
        results = pool.map(functools.partial(_error_of, do), short)
        with tqdm(total=len(short), desc="compiling", unit=" kinds", file=sys.stderr, disable=not show) as bar:
            try:
                for error in results:
                    errors += [error] if error else []
                    bar.update()
            except BrokenProcessPool:
                errors.append("a process died while it compiled (killed, out of memory, or crashed)")
    return errors


def _shortened(run: Run) -> Run:
    common = {"learning_rate": 1e-3, "seed": 0, "max_epochs": 1, "target_accuracy": None, "num_valid": _SCORED}
    if isinstance(run, MADRun):
        task = replace(run.task, num_train_examples=run.batch_size, num_test_examples=_SCORED)
        return replace(run, **common, task=task, weight_decay=0.0)
    return replace(run, **common, num_train=run.batch_size, num_test=_SCORED)


def _error_of(do: Callable[[Run], Any], run: Run) -> str | None:
    error = execute(do, run).error
    gc.collect()
    torch.cuda.empty_cache()  # others share the GPU: what is kept for the largest kind so far would soon fill it
    return error


def _take_gpu(names: Queue) -> None:
    """Let this process see one GPU, before it has looked for any; compiling needs no more than one core."""
    os.environ["CUDA_VISIBLE_DEVICES"] = names.get()
    os.environ["OMP_NUM_THREADS"] = "1"
