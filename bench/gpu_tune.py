"""Measure the configurations that autotuning mode `shipped` uses: `LRM_KERNELS_AUTOTUNE=full python bench/gpu_tune.py`.

Runs a training step and a prefill of each model of 1.3B parameters with the libraries' own tuning, which takes minutes
a model, and writes what won to kernels/lrm_kernels/tuned/sm_<capability>.json after each model, so that nothing is lost
when the time is up. Kernels that an earlier run measured, and this one did not reach, keep their entries.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time

import torch
import triton
from gpu_models import OURS, VOCAB, build, ours, prefill, train_step

from lrm_kernels import autotune

LENGTH = 8192


def save() -> int:
    """Add what was measured so far to the file of this kind of GPU; how many kernels it holds now."""
    major, minor = torch.cuda.get_device_capability()
    path = autotune.TUNED / f"sm_{major}{minor}.json"
    kernels = (json.loads(path.read_text())["kernels"] if path.exists() else {}) | autotune.measured()
    content = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    content["kernels"] = dict(sorted(kernels.items()))
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
    return len(kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=OURS, default=list(OURS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here whose configurations could be measured")
    if autotune.apply() != "full":
        parser.error(f"set {autotune.VARIABLE}=full: the other modes do not measure")
    for name in arguments.models:
        start = time.perf_counter()
        model = build(ours, name)
        ids = torch.randint(0, VOCAB, (1, LENGTH), device="cuda")
        for run in (train_step, prefill):
            run(model, ids)
            torch.cuda.synchronize()
            print(f"{name}, {run.__name__}: {save()} kernels after {time.perf_counter() - start:.0f} s", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
