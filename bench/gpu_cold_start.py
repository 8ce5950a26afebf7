"""Seconds from nothing to the first forward and backward of a GLA of 1.3B parameters, on a machine that never ran one.

Each autotuning mode runs in a process of its own with an empty Triton cache: `python bench/gpu_cold_start.py quick`.
Rows go to outputs/results/bench.<profile>.jsonl. `full` is what the library does by itself, and takes minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from gpu_models import HIDDEN, OURS, VOCAB

from lrm_kernels import autotune
from lrm_recall import RecurrentLMConfig
from lrm_recall.code_hash import code_hash
from lrm_recall.efficiency.cold_start import cold_start
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modes", nargs="+", choices=autotune.MODES)
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    path = profile_path(ROOT / "outputs" / "results", "bench", arguments.profile)
    config = RecurrentLMConfig(vocab_size=VOCAB, hidden_size=HIDDEN, mixer="gla", **OURS["gla"]).to_dict()
    for mode in arguments.modes:
        os.environ[autotune.VARIABLE] = mode
        metrics = cold_start(config, LENGTH, "bfloat16", torch.device("cuda"))
        metrics["first_step_s"] = metrics.pop("ms") / 1e3
        print(mode, {name: round(value, 1) for name, value in metrics.items()}, flush=True)
        ResultStore(path).append(make_row(
            experiment="bench_cold_start", config={"model": "gla", "length": LENGTH, "autotune": mode}, seed=0,
            data={"source": "random", "revision": ""}, code=code_hash(["lrm_kernels.autotune", "lrm_recall.model"]),
            profile=arguments.profile, machine=machine(), metrics=metrics, runtime_s=sum(metrics.values()),
        ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
