"""Train runs from a file, on as many GPUs as there are; rows go to the store.

    torchrun --standalone --nproc-per-node 2 -m lrm_recall.train.lm_command outputs/h100/lm_runs.jsonl \\
        --profile h100 --device cuda
    CUDA_VISIBLE_DEVICES=1 python -m lrm_recall.train.lm_command outputs/h100/lm_runs.jsonl --profile h100 --device cuda

The first (accelerate launch too) spreads each run over all GPUs. The second takes whole runs: start one on every GPU,
or two, with the same file and the same store, and each run is trained by one of them. The file has one `LMRun` a line,
as notebook 02 writes it. What is stored already is not trained; a notebook that asks for the same runs afterwards finds
their rows. Only the main process stores and prints.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lrm_recall.results import ResultStore, profile_path
from lrm_recall.rows import Row
from lrm_recall.sweep import deadline_after, plan_sweep, run_sweep
from lrm_recall.train.language_model import LMRun, run_lm
from lrm_recall.train.lm_checkpoints import forget_checkpoints
from lrm_recall.train.lm_data import prepared_corpus
from lrm_recall.train.lm_grid import GROUP, experiment, read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the file asks for; exit code 1 when a run failed, 2 when the file or an option cannot be used."""
    parser = argparse.ArgumentParser(prog="lm_command", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, help="a JSON Lines file of runs")
    parser.add_argument("--profile", required=True, help="whose rows these are")
    parser.add_argument("--results", type=Path, default=Path("outputs/results"), help="folder of rows")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="start no run that would end later, at the pace so far; the cheapest go first")
    options = parser.parse_args(arguments)
    try:
        runs, deadline = read_runs(options.runs), deadline_after(options.budget)
    except ValueError as error:
        print(f"lm_command: {error}", file=sys.stderr)
        return 2
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if options.budget is not None and not alone:
        print("lm_command: --budget is for processes that take whole runs: those of torchrun, which share each, would "
              "not agree on when time is up", file=sys.stderr)
        return 2
    store = ResultStore(profile_path(options.results, GROUP, options.profile))
    parts = _by_corpus(runs) if alone else [[run] for run in runs]  # processes of one run go from run to run together
    failed = [_train(part, store, options.profile, options.device, deadline) for part in parts]
    return 1 if any(failed) else 0


def _by_corpus(runs: Iterable[LMRun]) -> list[list[LMRun]]:
    """The runs in parts that read the same data, each part a sweep."""
    parts: dict[str, list[LMRun]] = {}
    for run in runs:
        parts.setdefault(repr((run.corpus, run.vocab_size, run.own_tokenizer, run.augmentation)), []).append(run)
    return list(parts.values())


def _train(runs: Sequence[LMRun], store: ResultStore, profile: str, device: str, deadline: float | None) -> bool:
    """Train the runs on one corpus that are not stored; whether one failed."""
    prepared = prepared_corpus(runs[0].corpus, runs[0].vocab_size, runs[0].own_tokenizer, runs[0].augmentation)
    how = experiment(prepared, device)
    plan = plan_sweep(runs, how, store, retry_failed=True)
    if not plan.missing:
        return False
    if int(os.environ.get("RANK", "0")):
        try:
            run_lm(plan.specs[plan.missing[0]], device=device)
        except Exception as error:  # the main process stores why; this one goes on to the next run with it
            print(f"lm_command: {error}", file=sys.stderr)
            return True
        return False

    def ended(row: Row) -> None:
        forget_checkpoints(row)
        print(row["key"], row["error"] or f"test loss {row['metrics']['test_loss']:.4f}", flush=True)

    rows = run_sweep(runs, how, store, profile=profile, retry_failed=True, deadline=deadline, on_row=ended)
    if len(rows) < len(plan.specs):
        print(f"{len(plan.specs) - len(rows)} runs were not started for want of time")
    return any(row["status"] != "ok" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
