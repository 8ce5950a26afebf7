"""Train runs from a file with torchrun or accelerate, on as many GPUs as there are; rows go to the store.

    torchrun --standalone --nproc-per-node 2 -m lrm_recall.train.lm_command outputs/h100/lm_runs.jsonl \\
        --profile h100 --device cuda

The file has one `LMRun` a line, as notebook 02 writes it. What is stored already is not trained; a notebook that asks
for the same runs afterwards finds their rows. Only the main process stores and prints.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_recall.results import ResultStore, profile_path
from lrm_recall.sweep import plan_sweep, run_sweep
from lrm_recall.train.language_model import LMRun, run_lm
from lrm_recall.train.lm_checkpoints import forget_checkpoints
from lrm_recall.train.lm_data import prepared_corpus
from lrm_recall.train.lm_grid import GROUP, experiment, read_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what the file asks for; exit code 1 when a run failed, 2 when the file cannot be used."""
    parser = argparse.ArgumentParser(prog="lm_command", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, help="a JSON Lines file of runs")
    parser.add_argument("--profile", required=True, help="whose rows these are")
    parser.add_argument("--results", type=Path, default=Path("outputs/results"), help="folder of rows")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.runs)
    except ValueError as error:
        print(f"lm_command: {error}", file=sys.stderr)
        return 2
    store = ResultStore(profile_path(options.results, GROUP, options.profile))
    failed = sum(_train(run, store, options.profile, options.device) for run in runs)
    return 1 if failed else 0


def _train(run: LMRun, store: ResultStore, profile: str, device: str) -> bool:
    """Train one run unless it is stored; whether it failed."""
    prepared = prepared_corpus(run.corpus, run.vocab_size, run.own_tokenizer, run.augmentation)
    how = experiment(prepared, device)
    plan = plan_sweep([run], how, store, retry_failed=True)
    if not plan.missing:
        return False
    if int(os.environ.get("RANK", "0")):
        try:
            run_lm(run, device=device)
        except Exception as error:  # the main process stores why; this one goes on to the next run with it
            print(f"lm_command: {error}", file=sys.stderr)
            return True
        return False
    rows = run_sweep([run], how, store, profile=profile, retry_failed=True, on_row=forget_checkpoints)
    print(plan.keys[0], rows[0]["error"] or f"test loss {rows[0]['metrics']['test_loss']:.4f}")
    return rows[0]["status"] != "ok"


if __name__ == "__main__":
    sys.exit(main())
