"""Our models of 1.3B parameters side by side with the libraries' own classes, on a GPU: `make bench-gpu`.

One run, random weights, bf16, batch 1: a training step (forward, backward) at 8K tokens, prefill at 2K to 128K, and
128 greedy tokens through `generate` after a prompt of 2K. Both sides use the same kernels and the same autotuning mode;
repeats are interleaved and medians reported. Peak memory is what one side holds at most, its weights included. Rows go
to outputs/results/bench.<profile>.jsonl, the table of ratios to the terminal.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import nn

from lrm_kernels import autotune
from lrm_recall import RecurrentLM, RecurrentLMConfig
from lrm_recall.code_hash import code_hash
from lrm_recall.efficiency.timing import copy_bandwidth, prefill, train_step
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path

ROOT = Path(__file__).resolve().parents[1]
VOCAB, HIDDEN = 32000, 2048
OURS = {
    "gla": {"num_hidden_layers": 24},
    "deltanet": {"num_hidden_layers": 24, "mixer_args": {"num_heads": 16}},
    "mamba": {"num_hidden_layers": 48, "mlp": "none"},
    "mamba2": {"num_hidden_layers": 48, "mlp": "none"},
}
LENGTHS = [2048, 8192, 32768, 131072]
TRAIN_LENGTH, PROMPT, NEW_TOKENS = 8192, 2048, 128
CODE = ("lrm_recall.model", "lrm_recall.ops.libraries.fla", "lrm_recall.ops.libraries.mamba_ssm",
        "lrm_recall.ops.libraries.causal_conv1d")  # fmt: skip


def ours(name: str) -> nn.Module:
    return RecurrentLM(RecurrentLMConfig(vocab_size=VOCAB, hidden_size=HIDDEN, mixer=name, **OURS[name]))


def theirs(name: str) -> nn.Module:
    """flash-linear-attention's class of the same shape."""
    from fla import models

    shape = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": OURS[name]["num_hidden_layers"]}
    if name == "gla":
        return models.GLAForCausalLM(models.GLAConfig(num_heads=4, expand_k=0.5, expand_v=1.0, **shape))
    if name == "deltanet":
        return models.DeltaNetForCausalLM(models.DeltaNetConfig(num_heads=16, **shape))
    if name == "mamba":
        return models.MambaForCausalLM(models.MambaConfig(state_size=16, residual_in_fp32=False, **shape))
    config = models.Mamba2Config(head_dim=64, num_heads=64, state_size=128, residual_in_fp32=False, **shape)
    return models.Mamba2ForCausalLM(config)


def build(make: Callable[[str], nn.Module], name: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return make(name)
        finally:
            torch.set_default_dtype(default)


@torch.no_grad()
def generate(model: nn.Module, ids: torch.Tensor, new_tokens: int = NEW_TOKENS + 1) -> None:
    """The prompt gives the first of the new tokens; each other is one step."""
    model.generate(ids, max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(ids))


def size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def measure(run: Callable, models: dict[str, nn.Module], ids: torch.Tensor, repeats: int) -> dict[str, dict]:
    """Median milliseconds, those until the host has launched everything among them, and peak MB of each side."""
    result = {side: {"ms": [], "host_ms": [], "peak_mb": 0.0} for side in models}
    for repeat in range(-max(1, min(2, repeats - 1)), repeats):  # the first compile
        for side, model in list(models.items())[:: 1 if repeat % 2 else -1]:  # neither side always comes first
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            others = sum(size(other) for name, other in models.items() if name != side)
            start = time.perf_counter()
            run(model, ids)
            launched = time.perf_counter()
            torch.cuda.synchronize()
            if repeat >= 0:
                result[side]["host_ms"].append(1e3 * (launched - start))
                result[side]["ms"].append(1e3 * (time.perf_counter() - start))
                result[side]["peak_mb"] = (torch.cuda.max_memory_allocated() - others) / 2**20
    for metrics in result.values():
        metrics |= {name: statistics.median(metrics[name]) for name in ("ms", "host_ms")}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--models", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--what", nargs="+", choices=("train", "prefill", "decode"),
                        default=["train", "prefill", "decode"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device; `make bench` runs on a CPU")
    autotune.apply()

    here, code = machine(), code_hash(CODE)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    path = profile_path(ROOT / "outputs" / "results", "bench", arguments.profile)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s; autotuning {autotune.mode()}")
    for name in arguments.models:
        models = {"ours": build(ours, name), "fla": build(theirs, name)}
        jobs = []
        if "train" in arguments.what:
            jobs.append(("train", train_step, TRAIN_LENGTH))
        if "prefill" in arguments.what:
            jobs += [("prefill", prefill, length) for length in arguments.lengths]
        if "decode" in arguments.what:
            jobs += [("prompt", partial(generate, new_tokens=1), PROMPT), ("generate", generate, PROMPT)]
        prompt: dict[str, dict] = {}
        for task, run, length in jobs:
            ids = torch.randint(0, VOCAB, (1, length), device="cuda")
            repeats = _repeats(task, length, arguments.repeats)
            for model in models.values():
                model.train(task == "train")
            result = measure(run, models, ids, repeats)
            floor = None
            if task == "prompt":
                prompt = result
            elif task == "generate":
                floor = 1e3 * NEW_TOKENS * size(models["ours"]) / bandwidth  # every weight read once a token
                for side, metrics in result.items():
                    metrics["decode_ms"] = metrics["ms"] - prompt[side]["ms"]
            print_line(name, task, length, result, floor)
            for side, metrics in result.items():
                ResultStore(path).append(make_row(
                    experiment="bench_gpu_models",
                    config={"model": name, "task": task, "length": length, "side": side, "dtype": "bfloat16",
                            "autotune": autotune.mode(),
                            "parameters": sum(p.numel() for p in models[side].parameters())},
                    seed=0, data={"source": "random", "revision": ""}, code=code, profile=arguments.profile,
                    machine=here, metrics={**metrics, "floor_ms": floor} if floor else metrics,
                    runtime_s=metrics["ms"] / 1e3 * repeats, peak_memory_mb=metrics["peak_mb"],
                ))  # fmt: skip
        del models
        gc.collect()
        torch.cuda.empty_cache()
    print(f"rows added to {path}")
    return 0


def _repeats(task: str, length: int, asked: int) -> int:
    """A library's loop takes seconds, and what takes milliseconds is at the mercy of the host."""
    if task == "generate":
        return min(asked, 2)
    return 3 * asked if task != "train" and length <= 8192 else asked


def print_line(name: str, task: str, length: int, result: dict[str, dict], floor: float | None) -> None:
    a, b = result["ours"], result["fla"]
    line = f"{name:9} {task:8} {length:7}  ms {a['ms']:9.1f} / {b['ms']:9.1f} = {a['ms'] / b['ms']:5.3f}"
    line += f" (the host {a['host_ms']:.1f} / {b['host_ms']:.1f})"
    line += f"   MB {a['peak_mb']:8.0f} / {b['peak_mb']:8.0f} = {a['peak_mb'] / b['peak_mb']:5.3f}"
    if floor:
        line += f"   decoding alone {a['decode_ms']:.0f} / {b['decode_ms']:.0f} ms, floor {floor:.0f}"
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
