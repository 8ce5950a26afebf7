"""What Resona adds to a decoded token of a 1.3B GLA, its retrieval beside the mixer and behind it, on a GPU.

GLA (24 layers of 2,048) alone and with Resona in layers 0, 12 and 23, in the options of notebook 05: chunks of 64,
k 4, 16 heads, the linear encoder with 128 numbers; random weights, bf16, one sequence, prompts of 2K and 128K tokens.
Both models are held at once and rounds alternate: the base model, Resona, and Resona captured on one stream, where
each retrieval waits for its mixer. In every round the step is captured anew; then the graph alone is replayed, and 128
tokens go through `generate`. Medians; about a minute on an H100. Rows go to outputs/results/bench.<profile>.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from gpu_models import VOCAB, build
from torch import Tensor, nn

from lrm_kernels import autotune
from lrm_recall import RecurrentLM, RecurrentLMConfig
from lrm_recall import decode as decoding
from lrm_recall.code_hash import code_hash
from lrm_recall.decode import Decoder, DecodingGraph
from lrm_recall.efficiency.grid import shallowest_middle_deepest
from lrm_recall.efficiency.timing import decode
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path
from lrm_recall.train.memory import peak_mb

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"vocab_size": VOCAB, "hidden_size": 2048, "num_hidden_layers": 24, "mixer": "gla"}
RESONA = {"layers": shallowest_middle_deepest(SHAPE["num_hidden_layers"]), "chunk_size": 64, "top_k": 4,
          "num_heads": 16, "encoder": "linear", "encoder_dim": 128}  # fmt: skip
MODELS = {"base": None, "resona": RESONA}
SIDES = {"base": ("base", True), "resona": ("resona", True), "resona, one stream": ("resona", False)}  # model, fork
LENGTHS = [2048, 131072]
NEW_TOKENS, REPLAYS = 128, 100  # fewer than the buffers have room for
CODE = ("lrm_recall.model", "lrm_recall.resona.layer", "lrm_recall.mixers.gla", "lrm_recall.ops.libraries.own",
        "lrm_recall.ops.libraries.fla")  # fmt: skip


def make(name: str) -> nn.Module:
    return RecurrentLM(RecurrentLMConfig(**SHAPE, resona=MODELS[name]))


@torch.no_grad()
def capture(model: nn.Module, prompt: object, fork: bool) -> DecodingGraph:
    """A graph of the step behind a prompt, which stays as it is; the model replays that graph from then on."""
    model._decoder = Decoder()  # the graph before goes, and its memory
    cache = copy.deepcopy(prompt.past_key_values)
    one_stream = mock.patch.object(decoding, "beside", lambda layers: contextlib.nullcontext())
    with contextlib.nullcontext() if fork else one_stream:
        model(prompt.logits[:, -1:].argmax(-1), past_key_values=cache)
    return model._decoder._graph


def replay_us(graph: DecodingGraph) -> float:
    """Microseconds of one replay, of many in a row. What the buffers hold then is of no use to their cache."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph._replayed.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / REPLAYS


def measure(
    models: dict[str, nn.Module], ids: Tensor, repeats: int, replay: Callable[[DecodingGraph], float]
) -> dict[str, dict[str, float]]:
    """Metrics of each side behind the prompt ids [1, T]."""
    with torch.no_grad():
        prompts = {name: model(ids, use_cache=True, logits_to_keep=1) for name, model in models.items()}
    times = {side: {"replay_us": [], "decode_ms": []} for side in SIDES}
    for _ in range(repeats):
        for side, (name, fork) in SIDES.items():
            graph = capture(models[name], prompts[name], fork)
            times[side]["replay_us"].append(replay(graph))
            times[side]["decode_ms"].append(1e3 * decode(models[name], ids, NEW_TOKENS))
            if models[name]._decoder._graph is not graph:
                raise RuntimeError(f"{side}: the step was captured again while it was timed")
    return {side: _metrics(found, times["base"]) for side, found in times.items()}


def _metrics(times: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, float]:
    """Median, least and most of each kind of time, and the median's ratio to that of the base model."""
    metrics = {}
    for name, found in times.items():
        median = statistics.median(found)
        metrics |= {name: median, f"{name}_least": min(found), f"{name}_most": max(found),
                    f"{name}_ratio": median / statistics.median(base[name])}  # fmt: skip
    return metrics


def bench(profile: str, results: Path, repeats: int, replay: Callable[[DecodingGraph], float] = replay_us) -> None:
    """Measure every side behind every prompt; add the rows."""
    models = {name: build(make, name).eval() for name in MODELS}
    device = models["base"].device
    store, here, code = ResultStore(profile_path(results, "bench", profile)), machine(), code_hash(CODE)
    for length in LENGTHS:
        start = time.perf_counter()
        found = measure(models, torch.randint(0, SHAPE["vocab_size"], (1, length), device=device), repeats, replay)
        seconds = time.perf_counter() - start
        for side, metrics in found.items():
            name, fork = SIDES[side]
            print_line(side, length, metrics, len(RESONA["layers"]) * (name != "base"), found["base"])
            store.append(make_row(
                experiment="bench_gpu_resona_decode",
                config={"model": SHAPE["mixer"], "side": side, "length": length, "new_tokens": NEW_TOKENS, "fork": fork,
                        "resona": MODELS[name], "dtype": str(models[name].dtype)[6:], "autotune": autotune.mode(),
                        "parameters": sum(p.numel() for p in models[name].parameters())},
                seed=0, data={"source": "random", "revision": ""}, code=code, profile=profile, machine=here,
                metrics=metrics, runtime_s=seconds / len(found), peak_memory_mb=peak_mb(device),
            ))  # fmt: skip
    print(f"rows added to {store.path}")


def print_line(side: str, length: int, metrics: dict[str, float], layers: int, base: dict[str, float]) -> None:
    line = f"{length:7} {side:20}"
    for name, unit in (("replay_us", "us a replay"), ("decode_ms", f"ms for {NEW_TOKENS} tokens")):
        least, most = metrics[f"{name}_least"], metrics[f"{name}_most"]
        line += f" {metrics[name]:8.1f} {unit} ({least:.1f} to {most:.1f}) {metrics[f'{name}_ratio']:6.3f} |"
    if layers:
        line += f" {(metrics['replay_us'] - base['replay_us']) / layers:6.1f} us a Resona layer"
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "results", help="folder of that file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    autotune.apply()
    bench(arguments.profile, arguments.results, arguments.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
