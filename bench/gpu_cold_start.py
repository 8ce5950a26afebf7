"""Seconds from nothing to the first forward and backward of a GLA of 1.3B parameters, on a machine that never ran one.

Each autotuning mode runs in a process of its own with an empty Triton cache: `python bench/gpu_cold_start.py quick`.
Rows go to outputs/results/bench.<profile>.jsonl. `full` is what the library does by itself, and takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lrm_kernels import autotune

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 8192


def first_step() -> dict[str, float]:
    """In this process: seconds of the imports, of building the model, of the first forward and the first backward."""
    marks = [time.perf_counter()]
    import torch
    from gpu_models import VOCAB, build, ours

    marks.append(time.perf_counter())
    model = build(ours, "gla")
    ids = torch.randint(0, VOCAB, (1, LENGTH), device="cuda")
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
    loss = model(input_ids=ids, labels=ids).loss
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
    loss.backward()
    torch.cuda.synchronize()
    marks.append(time.perf_counter())
    names = ("import_s", "build_s", "forward_s", "backward_s")
    return dict(zip(names, (b - a for a, b in zip(marks, marks[1:], strict=False)), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modes", nargs="+", choices=autotune.MODES)
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(first_step()))
        return 0
    from lrm_recall.code_hash import code_hash
    from lrm_recall.provenance import machine
    from lrm_recall.results import ResultStore, make_row, profile_path

    path = profile_path(ROOT / "outputs" / "results", "bench", arguments.profile)
    for mode in arguments.modes:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, autotune.VARIABLE: mode, "TRITON_CACHE_DIR": cache}
            command = [sys.executable, __file__, mode, "--here"]
            result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        metrics = json.loads(result.stdout.splitlines()[-1])
        metrics["first_step_s"] = metrics["forward_s"] + metrics["backward_s"]
        print(mode, {name: round(value, 1) for name, value in metrics.items()}, flush=True)
        ResultStore(path).append(make_row(
            experiment="bench_cold_start", config={"model": "gla", "length": LENGTH, "autotune": mode}, seed=0,
            data={"source": "random", "revision": ""}, code=code_hash(["lrm_kernels.autotune", "lrm_recall.model"]),
            profile=arguments.profile, machine=machine(), metrics=metrics, runtime_s=sum(metrics.values()),
        ))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
