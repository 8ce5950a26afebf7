"""Measure the configurations that autotuning mode `shipped` uses: `LRM_KERNELS_AUTOTUNE=full python bench/gpu_tune.py`.

Runs a training step and a prefill of each model at the sizes of 1.3B parameters, in two layers, with the libraries' own
tuning, and writes what won to kernels/lrm_kernels/tuned/sm_<capability>.json after each, so that nothing is lost when
the time is up. Kernels that an earlier run measured, and this one did not reach, keep their entries.

Nearly all of the time is compiling, one configuration after the other. Several processes with `--compile I/N` share
that work through Triton's cache on disk and write nothing; the run that measures comes after them, alone:

    for i in 0 1 2 3 4 5 6 7; do LRM_KERNELS_AUTOTUNE=full python bench/gpu_tune.py --compile $i/8 & done; wait
    LRM_KERNELS_AUTOTUNE=full python bench/gpu_tune.py
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time

import torch
import triton
from gpu_models import HIDDEN, OURS, VOCAB, build
from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench

from lrm_kernels import autotune
from lrm_recall import RecurrentLM, RecurrentLMConfig
from lrm_recall.efficiency.timing import prefill, train_step

LENGTH, LAYERS = 8192, 2
WARMUP_MS, REPEAT_MS = 5, 20  # of one configuration; Triton's own 25 and 100 take five times as long


def two_layers(name: str) -> RecurrentLM:
    """The shapes of the model of 1.3B parameters; every layer launches the same kernels."""
    shape = OURS[name] | {"num_hidden_layers": LAYERS}
    return RecurrentLM(RecurrentLMConfig(vocab_size=VOCAB, hidden_size=HIDDEN, mixer=name, **shape))


def only_compile(part: int, parts: int) -> None:
    """Launch every configuration once instead of timing it, and begin at another one than the other processes."""
    prune = Autotuner.prune_configs

    def rotated(self: Autotuner, *args, **kwargs) -> list:
        configs = prune(self, *args, **kwargs)
        start = len(configs) * part // parts
        return configs[start:] + configs[:start]

    def launch(self: Autotuner, call, quantiles) -> list[float]:
        call()
        return [0.0] * len(quantiles)

    Autotuner.prune_configs, Autotuner.do_bench = rotated, launch


def measure() -> None:
    """Time each configuration for a fifth of what Triton takes."""
    Autotuner.do_bench = lambda self, call, quantiles: do_bench(
        call, warmup=WARMUP_MS, rep=REPEAT_MS, quantiles=quantiles
    )


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
    parser.add_argument("--compile", metavar="I/N", help="compile only, as one of N processes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here whose configurations could be measured")
    if autotune.apply() != "full":
        parser.error(f"set {autotune.VARIABLE}=full: the other modes do not measure")
    if arguments.compile:
        only_compile(*map(int, arguments.compile.split("/")))
    else:
        measure()
    for name in arguments.models:
        start = time.perf_counter()
        model = build(two_layers, name)
        ids = torch.randint(0, VOCAB, (1, LENGTH), device="cuda")
        for run in (train_step, prefill):
            model.train(run is train_step)
            run(model, ids)
            torch.cuda.synchronize()
            kernels = len(autotune.measured()) if arguments.compile else save()
            print(f"{name}, {run.__name__}: {kernels} kernels after {time.perf_counter() - start:.0f} s", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
