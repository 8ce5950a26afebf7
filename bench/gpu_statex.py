"""StateX at the papers' shapes: one training step at 64K tokens on one GPU, and what it costs over the model before.

GLA of 1.3B with 4 of 24 layers merged into one head (d_k 1,024, d_v 2,048), Mamba2 of 1.3B with d_state 512 in 4 and in
8 of 48 layers; bf16, batch 1, gradient checkpointing by layer. Rows go to outputs/results/bench.<profile>.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch
from gpu_models import VOCAB, build, ours

from lrm_kernels import autotune
from lrm_recall import expand_state
from lrm_recall.code_hash import code_hash
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path

ROOT = Path(__file__).resolve().parents[1]
CASES = [("gla", 0), ("gla", 4), ("mamba2", 0), ("mamba2", 4), ("mamba2", 8)]  # (model, layers expanded)


def step(model: torch.nn.Module, length: int) -> dict[str, float]:
    """Milliseconds and peak GB of one forward and backward, the second one; the loss."""
    ids = torch.randint(0, VOCAB, (1, length), device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.cuda.synchronize()
        ms, peak = 1e3 * (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 2**30
        finite = all(p.grad.isfinite().all().item() for p in model.parameters())
        model.zero_grad(set_to_none=True)
    return {"ms": ms, "peak_gb": peak, "loss": loss.item(), "finite gradients": float(finite)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--length", type=int, default=65536)
    arguments = parser.parse_args()
    path = profile_path(ROOT / "outputs" / "results", "bench", arguments.profile)
    for name, layers in CASES:
        model = build(ours, name)
        size = model.state_size()
        if layers:
            model = expand_state(model, layers)
        model.train()
        model.gradient_checkpointing_enable()
        reason, metrics = None, {}
        try:
            metrics = step(model, arguments.length)
        except torch.OutOfMemoryError as failure:
            reason = f"out of memory: {failure}"[:300]
        metrics |= {"state": float(model.state_size()), "growth": model.state_size() / size} if metrics else {}
        print(name, layers, reason or {key: float(f"{value:.6g}") for key, value in metrics.items()}, flush=True)
        ResultStore(path).append(make_row(
            experiment="bench_statex", config={
                "model": name, "expanded_layers": layers, "length": arguments.length, "dtype": "bfloat16",
                "checkpointing": "every layer", "autotune": autotune.mode(),
            }, seed=0, data={"source": "random", "revision": ""},
            code=code_hash(["lrm_recall.statex.surgery", "lrm_recall.model"]), profile=arguments.profile,
            machine=machine(), metrics=metrics, runtime_s=metrics.get("ms", 0.0) / 1e3,
            peak_memory_mb=metrics.get("peak_gb", 0.0) * 1024, error=reason,
        ))  # fmt: skip
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
