"""`lrm-recall sweep`: what a notebook trains, without the notebook.

    lrm-recall sweep synthetic --profile paper --workers 8        what notebook 01 trains at this profile
    lrm-recall sweep synthetic --profile paper --dry-run          list what is missing and what it will cost
    lrm-recall sweep synthetic --only mixer=mamba --only variant=[base,resona0]
    lrm-recall sweep synthetic --workers tcp://10.0.0.1:8786      on a Dask cluster
    lrm-recall sweep synthetic --shard 2/3 --budget 540           a third of the runs, about 9 minutes
    lrm-recall sweep synthetic --compile-first 32                 first the kernels of all of them, in 32 processes

Runs that are stored are not done again, nor those that another sweep on the same store has in hand; failed ones only
with --retry-failed. Each row is on disk as soon as its run ends, so a sweep may be stopped at any time. Rows of
machines that share nothing come together by `lrm-recall results merge`.

Exit code 0: done, or the time was up; 1: runs have failed, or the sweep could not go on; 2: a mistake in what was
asked, nothing has been done; 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrm_recall.execution import BrokenProcess, gpus
from lrm_recall.options import did_you_mean
from lrm_recall.parameters import ParameterError, check_folder, read_assignments
from lrm_recall.progress import duration
from lrm_recall.results import ResultStore, StoreError, profile_path
from lrm_recall.sweep import Experiment, Plan
from lrm_recall.sweep_choice import chosen, condition, shard

if TYPE_CHECKING:
    from lrm_recall.workbook import Workbook

NOTEBOOKS = {"synthetic": "01_synthetic"}  # what can be swept, and the notebook that asks for the same runs


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `sweep` and `results` to the command line."""
    sweep = commands.add_parser("sweep", help="do the missing runs of a notebook, without the notebook")
    sweep.add_argument("group", metavar="WHAT", help=f"what to sweep: {', '.join(NOTEBOOKS)}")
    sweep.add_argument("--profile", default="smoke", help="folder of params/ with the values (default: smoke)")
    sweep.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE",
                       help="set one parameter of the notebook")  # fmt: skip
    sweep.add_argument("--workers", type=_workers, metavar="N|ADDRESS",
                       help="runs at a time, or a Dask scheduler (default: the profile's)")  # fmt: skip
    sweep.add_argument("--device", help="cpu, cuda, or cuda:1 (default: the profile's)")
    sweep.add_argument("--only", action="append", default=[], metavar="KEY=VALUE",
                       help="runs with this value, or one of a list; all keys must fit")  # fmt: skip
    sweep.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N",
                       help="the I-th of N parts, for machines that share nothing")  # fmt: skip
    sweep.add_argument("--budget", type=_seconds, metavar="SECONDS",
                       help="start no run that would end after this time, as far as those before it tell")  # fmt: skip
    sweep.add_argument("--compile-first", type=_count, metavar="N",
                       help="on GPUs: first compile the kernels of all runs, in N processes")  # fmt: skip
    sweep.add_argument("--retry-failed", action="store_true", help="try failed runs again")
    sweep.add_argument("--dry-run", action="store_true", help="list what is missing and its cost; run nothing")
    sweep.add_argument("--results", type=Path, metavar="DIR", help="rows (default: outputs/results)")
    sweep.set_defaults(command=_sweep)


def _sweep(workbook: Workbook, options: argparse.Namespace) -> int:
    begun = time.monotonic()
    if options.group not in NOTEBOOKS:
        near = did_you_mean(options.group, NOTEBOOKS)
        raise ParameterError([f"there is no sweep {options.group!r}{near}; there are: {', '.join(NOTEBOOKS)}"])
    name = NOTEBOOKS[options.group]
    results_dir = options.results or workbook.root / "outputs" / "results"
    check_folder(results_dir, "--results")
    parameters = workbook.parameters(name, options.profile, read_assignments(options.parameters))
    try:
        from lrm_recall.train.device import usable_device
        from lrm_recall.train.rates import plan_rates
        from lrm_recall.train.synthetic_runs import by_experiment, synthetic_experiments, synthetic_runs

        only = [condition(word) for word in options.only]
        device = options.device or parameters["device"]
        workers = parameters["workers"] if options.workers is None else options.workers
        if not options.dry_run and not isinstance(workers, str):  # a cluster's workers have devices of their own
            usable_device(device)
        if options.compile_first is not None and (isinstance(workers, str) or not device.startswith("cuda")):
            raise ValueError(f"--compile-first compiles on this machine's GPUs, not for device {device!r} and workers "
                             f"{workers!r}")
        experiments = synthetic_experiments(device)
        asked = shard(chosen(by_experiment(synthetic_runs(parameters)), only), experiments, *options.shard)
    except ValueError as error:
        raise ParameterError([str(error)]) from None
    store = ResultStore(profile_path(results_dir, options.group, options.profile))
    try:
        if options.dry_run:
            for each, runs in asked.items():
                plan = plan_rates(runs, experiments[each], store, retry_failed=options.retry_failed)
                print(_cost(plan, experiments[each], store))
            return 0
        if options.compile_first is not None:
            _compile(asked, experiments, store, device, options)
        deadline = None if options.budget is None else begun + options.budget
        return _run(asked, experiments, store, profile=options.profile, workers=workers, device=device,
                    retry_failed=options.retry_failed, deadline=deadline)
    except StoreError as error:
        raise ParameterError([str(error)]) from None
    except (OSError, BrokenProcess) as error:  # a full disk, a scheduler or a GPU that went away
        print(f"lrm-recall: {error}; the rows stored so far are kept", file=sys.stderr)
        return 1


def _run(asked: Mapping[str, list], experiments: Mapping[str, Experiment], store: ResultStore, **how: Any) -> int:
    """Do the missing runs, say what came of it; the exit code."""
    from lrm_recall.train.rates import plan_rates, sweep_rates

    rows = []
    with _terminated_as_interrupted(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d+ of \d+ runs failed")  # said below
        for name, runs in asked.items():
            rows += sweep_rates(runs, experiments[name], store, **how)
    failed = [row for row in rows if row["status"] == "failed"]
    left = 0
    if how["deadline"] is not None:
        left = sum(len(plan_rates(runs, experiments[name], store).missing)
                   for name, runs in asked.items())
    parts = [f"{len(rows) - len(failed)} rows of these runs"]
    parts += [f"{len(failed)} failed"] if failed else []
    parts += [f"{left} not started for want of time"] if left else []
    print(f"{store.path}: {', '.join(parts)}")
    for reason, count in _counts(row["error"] for row in failed).items():
        print(f"lrm-recall: {count} failed: {reason} (--retry-failed tries again)", file=sys.stderr)
    return 1 if failed else 0


def _compile(
    asked: Mapping[str, list], experiments: Mapping[str, Experiment], store: ResultStore, device: str,
    options: argparse.Namespace,
) -> None:
    """Compile what the missing runs will need."""
    from lrm_recall.train.compile_ahead import compile_ahead
    from lrm_recall.train.rates import plan_rates

    seen = gpus() if device == "cuda" else [",".join(gpus())]  # "cuda:1" counts among all that are visible
    for name, runs in asked.items():
        plan = plan_rates(runs, experiments[name], store, retry_failed=options.retry_failed)
        errors = compile_ahead([plan.specs[key] for key in plan.missing], experiments[name].run,
                               processes=options.compile_first, gpus=seen)  # fmt: skip
        for reason, count in _counts(errors).items():
            print(f"lrm-recall: {count} kinds of {name} runs did not compile: {reason}", file=sys.stderr)


# --- what it will cost


def _cost(plan: Plan, experiment: Experiment, store: ResultStore) -> str:
    """The plan in words, the expected time on one core, and on each device that has done such runs before."""
    lines = [str(plan)]
    if plan.missing and plan.cost is not None:
        hint = sum(plan.cost.values())
        lines.append("  on one CPU core, and at most: a model that is solved is not tried at the next learning rate")
        done: dict[str, list[tuple[float, float]]] = {}
        for row in store.rows():
            if row["key"] in plan.specs:
                pair = experiment.cost(plan.specs[row["key"]]), row["runtime_s"]
                done.setdefault(row["machine"].get("device", "cpu"), []).append(pair)
        for device, pairs in done.items():
            hints, seconds = (sum(numbers) for numbers in zip(*pairs, strict=True))
            took = duration(hint * seconds / hints)
            lines.append(f"  judged by {len(pairs)} stored runs, {took} on {device}, one run at a time")
    return "\n".join(lines)


def _counts(reasons: Iterable[str]) -> dict[str, int]:
    """How often each reason is given, numbers in it left out."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for reason in reasons:
        kind = first.setdefault(re.sub(r"\d+", "#", reason), reason)
        counts[kind] = counts.get(kind, 0) + 1
    return counts


# --- words of the command line


def _workers(text: str) -> int | str:
    if "://" in text:
        return text
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of workers above 0 nor an address such as "
                                         "tcp://10.0.0.1:8786")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a whole, such as 1/3, 2/3 or 3/3")
    return int(match[1]) - 1, int(match[2])


def _seconds(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds above 0")
    return int(text)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which ends jobs on leased machines, stops a sweep as Ctrl-C does: workers too, claims given back."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
