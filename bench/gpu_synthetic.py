"""Training the small models of MQAR: ours beside zoology's own trainer, and how many runs fit side by side on a GPU.

    python bench/gpu_synthetic.py --zoology PATH     PATH holds the package `zoology` (github.com/HazyResearch/zoology)

Both sides train four layers of one mixer on the same examples in batches of the same size: input length 512, 32 pairs,
hidden size 128, batch size 128, vocabulary 8,192, as in zoology's Figure 2. What is timed is an epoch of training, the
second, and scoring 1,000 examples; ours in fp32 (as zoology), tf32 and bf16, and in fp32 without CUDA graphs.
Zoology is as published but for three things: logits are asked of its model, which otherwise returns hidden states to
its own trainer; autograd's anomaly detection, which its Mamba2 leaves switched on, is off; nothing is logged. Triton
tunes both sides in the same mode. Then `run_mqar` in 1, 4, 8 and 16 threads: whole runs, data and capture included.
Rows go to outputs/results/bench.<profile>.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrm_kernels import autotune
from lrm_recall.code_hash import code_hash
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path
from lrm_recall.tasks.mqar import mqar, split_seed
from lrm_recall.train.device import own_stream, turn
from lrm_recall.train.graph import GraphLoop
from lrm_recall.train.grid import mqar_runs
from lrm_recall.train.loop import logits_of_questions
from lrm_recall.train.plain import PlainLoop
from lrm_recall.train.start import initial_model
from lrm_recall.train.synthetic import MQARRun, code_modules, mqar_splits, run_mqar

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda")
LENGTH, PAIRS, BATCH, D_MODEL, LAYERS, VOCAB = 512, 32, 128, 128, 4, 8192
TRAIN, VALID = 20 * BATCH, 1000  # examples of a timed epoch, and of scoring
PAPER_TRAIN = 20_000  # examples of an epoch of the paper
THEIRS = {
    "baseconv": ("base_conv.BaseConv", {"l_max": LENGTH, "kernel_size": [3, -1, 3, -1]}, "TransformerBlock"),
    "mamba2": ("mamba2.Mamba2", {}, "Mamba2Block"),
    "attention": ("attention.MHA", {"dropout": 0.1, "num_heads": 1}, "TransformerBlock"),
}
PACKED = {"mixers": ["baseconv"], "lengths": {256: 16}, "d_models": [64], "variants": ["resona0"]}
PACKED_SETTINGS = {"batch_size": 256, "max_epochs": 12, "target_accuracy": None, "generator": "fast",
                   "precision": "tf32"}  # fmt: skip


def our_run(mixer: str, precision: str) -> MQARRun:
    (run,) = mqar_runs(
        mixers=[mixer], lengths={LENGTH: PAIRS}, d_models=[D_MODEL], variants=["base"], learning_rates=[1e-3],
        mixer_args={"attention": {"num_heads": 1}} if mixer == "attention" else None,
        settings={"num_train": TRAIN, "num_valid": VALID, "num_test": VALID, "batch_size": BATCH, "max_epochs": 16,
                  "generator": "fast", "precision": precision, "num_layers": LAYERS},
    )  # fmt: skip
    return run


def timed(epoch: Any, score: Any, steps: int) -> dict[str, float]:
    """Seconds of an epoch after one to warm up, and of scoring; both end with the device idle."""
    epoch(), score()
    torch.cuda.synchronize()
    start = time.perf_counter()
    epoch()
    torch.cuda.synchronize()
    middle = time.perf_counter()
    score()
    torch.cuda.synchronize()
    end = time.perf_counter()
    per_s = steps / (middle - start)
    return {"steps_per_s": per_s, "score_s": end - middle, "epoch_s": PAPER_TRAIN / BATCH / per_s + end - middle}


def ours(mixer: str, precision: str, captured: bool) -> dict[str, float]:
    """Our loop, replayed or kernel by kernel."""
    run = our_run(mixer, precision)
    with own_stream(GPU):
        settings, splits = run.to_fit_settings(), mqar_splits(run).to(GPU)
        model = initial_model(run.to_model_config(), run.seed).to(GPU)
        start = time.perf_counter()
        if captured:
            loop: GraphLoop | PlainLoop = GraphLoop(settings, model, splits, logits_of_questions)
        else:
            loop = PlainLoop(settings, model, splits.train, logits_of_questions,
                             functools.partial(turn, precision))  # fmt: skip
        torch.cuda.synchronize()
        setup = time.perf_counter() - start
        steps = settings.steps_per_epoch(TRAIN)
        return {**timed(loop.epoch, lambda: loop.predict(splits.valid), steps), "setup_s": setup}


def theirs(mixer: str) -> dict[str, float]:
    """zoology's Trainer on the same examples."""
    from zoology.config import ModelConfig
    from zoology.data.utils import DataSegment, _SyntheticDataset
    from zoology.model import LanguageModel
    from zoology.train import Trainer

    name, options, block = THEIRS[mixer]
    model = LanguageModel(ModelConfig(
        d_model=D_MODEL, n_layers=LAYERS, block_type=block, vocab_size=VOCAB,
        max_position_embeddings=LENGTH if mixer == "attention" else 0,
        sequence_mixer={"name": f"zoology.mixers.{name}", "kwargs": options},
        state_mixer={"name": "torch.nn.Identity", "kwargs": {}},
    ))  # fmt: skip
    model.forward = functools.partial(model.forward, return_embeddings=False)
    loaders = {}
    for split, size in (("train", TRAIN), ("valid", VALID)):
        data = mqar(vocab_size=VOCAB, num_examples=size, input_length=LENGTH, num_kv_pairs=PAIRS,
                    generator="fast", seed=split_seed(0, split))  # fmt: skip
        segment = DataSegment(data.inputs, data.labels, slices={})
        loaders[split] = torch.utils.data.DataLoader(_SyntheticDataset([segment], BATCH), batch_size=None)
    silent = types.SimpleNamespace(log=lambda metrics: None)
    trainer = Trainer(model, loaders["train"], loaders["valid"], device=GPU, logger=silent, learning_rate=1e-3)
    model.to(GPU)  # what its `fit` does before the first epoch
    trainer.loss_fn = nn.CrossEntropyLoss()
    trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    return timed(lambda: trainer.train_epoch(0), lambda: trainer.test(0), TRAIN // BATCH)


def import_zoology(path: Path) -> None:
    """Make `zoology` importable without the packages that only its logging and its unused options need."""
    sys.path.insert(0, str(path))
    wandb, torchvision, ops = (types.ModuleType(name) for name in ("wandb", "torchvision", "torchvision.ops"))
    ops.StochasticDepth = lambda p, mode: nn.Identity()  # drop_path is 0
    torchvision.ops = ops
    for module in (wandb, torchvision, ops):
        sys.modules.setdefault(module.__name__, module)
    torch.autograd.set_detect_anomaly = lambda mode: contextlib.nullcontext()


def packed(workers: int) -> dict[str, float]:
    """Whole runs in `workers` threads, one each (four where there is one thread)."""
    (run,) = mqar_runs(**PACKED, learning_rates=[1e-2], settings=PACKED_SETTINGS)
    runs = [replace(run, learning_rate=1e-2 / (1 + index)) for index in range(max(4, workers))]  # the same data
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(functools.partial(run_mqar, device="cuda"), runs))
    seconds = time.perf_counter() - start
    steps = sum(result["metrics"]["steps"] for result in results)
    return {"runs_per_hour": 3600 * len(runs) / seconds, "steps_per_s": steps / seconds,
            "run_s": sum(result["runtime_s"] for result in results) / len(runs)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--zoology", type=Path, help="folder that holds the package zoology; without it, ours alone")
    parser.add_argument("--mixers", nargs="*", default=list(THEIRS), help=f"of {', '.join(THEIRS)} (default: all)")
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 4, 8, 16], help="threads (default: 1 4 8 16)")
    arguments = parser.parse_args()
    if unknown := set(arguments.mixers) - set(THEIRS):  # argparse's `choices` refuses an empty list
        parser.error(f"unknown mixers {', '.join(sorted(unknown))}; there are: {', '.join(THEIRS)}")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    autotune.apply()
    sides = {"ours": functools.partial(ours, precision="fp32", captured=True),
             "ours tf32": functools.partial(ours, precision="tf32", captured=True),
             "ours bf16": functools.partial(ours, precision="bf16", captured=True),
             "ours, no graph": functools.partial(ours, precision="fp32", captured=False)}  # fmt: skip
    if arguments.zoology:
        import_zoology(arguments.zoology)
        sides["zoology"] = theirs

    here = machine()
    store = ResultStore(profile_path(ROOT / "outputs" / "results", "bench", arguments.profile))

    def add(config: dict[str, Any], run: MQARRun, metrics: dict[str, float], seconds: float) -> None:
        store.append(make_row(
            experiment="bench_gpu_synthetic", config={**config, "autotune": autotune.mode()}, seed=0,
            data={"source": "lrm_recall.tasks.mqar", "revision": "generated"}, code=code_hash(code_modules(run)),
            profile=arguments.profile, machine=here, metrics=metrics, runtime_s=seconds,
            peak_memory_mb=torch.cuda.max_memory_allocated() / 1e6,
        ))  # fmt: skip

    for mixer in arguments.mixers:
        found: dict[str, float] = {}
        for side, measure in sides.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                metrics = measure(mixer)
            except Exception as error:  # a side that cannot run leaves the others their rows
                print(f"{mixer:10} {side:14} failed: {type(error).__name__}: {error}", flush=True)
                continue
            found[side] = metrics["steps_per_s"]
            add({"task": "train", "mixer": mixer, "side": side, "length": LENGTH, "d_model": D_MODEL,
                 "batch_size": BATCH}, our_run(mixer, "fp32"), metrics, time.perf_counter() - start)  # fmt: skip
            ratio = f"{found[side] / found['zoology']:.1f} x" if "zoology" in found else ""
            print(f"{mixer:10} {side:14} {metrics['steps_per_s']:8.1f} steps/s  {metrics['epoch_s']:7.2f} s/epoch  "
                  f"scoring {metrics['score_s']:6.3f} s  {ratio}", flush=True)
        if "zoology" in found:
            print(f"{mixer:10} " + ", ".join(f"{side} {found[side] / found['zoology']:.1f} x zoology"
                                             for side in found if side != "zoology"), flush=True)
    (run,) = mqar_runs(**PACKED, learning_rates=[1e-2], settings=PACKED_SETTINGS)
    for index, workers in enumerate([1, *arguments.workers] if arguments.workers else []):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        metrics = packed(workers)
        if index == 0:  # kernels compiled, data made
            continue
        add({"task": "packing", "workers": workers, "mixer": run.mixer, "variant": run.variant, "length": 256,
             "d_model": 64, "epochs": run.max_epochs}, run, metrics, time.perf_counter() - start)  # fmt: skip
        print(f"{workers:3} at once  {metrics['runs_per_hour']:8.0f} runs/hour  {metrics['steps_per_s']:8.0f} steps/s  "
              f"{metrics['run_s']:6.2f} s a run", flush=True)
    print(f"rows added to {store.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
