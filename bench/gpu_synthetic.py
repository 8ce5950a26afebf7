"""Training small models: ours beside the trainers of zoology and mad-lab, and how many runs fit side by side on a GPU.

    python bench/gpu_synthetic.py --zoology PATH     PATH holds the package `zoology` (github.com/HazyResearch/zoology)
    python bench/gpu_synthetic.py --mad PATH --mixers --workers    PATH holds `mad` and `configs` (github.com/athms/
                                                                   mad-lab); nothing but MAD

MQAR: four layers of one mixer, input length 512, 32 pairs, hidden size 128, batch size 128, vocabulary 8,192, as in
zoology's Figure 2. MAD: in-context recall with mad-lab's defaults, two layers of one mixer and two of SwiGLU, length
128, hidden size 128, batch size 128, vocabulary 16, 12,800 examples an epoch. Both sides train on the same examples;
what is changed in the other one stands in synthetic_references.py. What is timed is an epoch of training, the median of
some after the first, and scoring the test set; ours in fp32 (as zoology), tf32, bf16 (as mad-lab), and in fp32 without
CUDA graphs. Triton tunes both sides in the same mode.
Then `run_mqar` in 1, 4, 8 and 16 threads: whole runs, data and capture included.
Rows go to outputs/results/bench.<profile>.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from synthetic_references import MAD_LAB, ZOOLOGY, Seconds, import_mad, import_zoology, mad_lab, now, timed, zoology

from lrm_kernels import autotune
from lrm_recall.code_hash import code_hash
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path
from lrm_recall.tasks.mad import MADTask
from lrm_recall.train import mad, synthetic
from lrm_recall.train.batches import Splits
from lrm_recall.train.device import own_stream, turn
from lrm_recall.train.graph import GraphLoop
from lrm_recall.train.grid import mqar_runs
from lrm_recall.train.loop import logits_of_questions
from lrm_recall.train.mad import MADRun
from lrm_recall.train.mad_grid import mad_runs
from lrm_recall.train.plain import PlainLoop
from lrm_recall.train.start import initial_model
from lrm_recall.train.synthetic import MQARRun, run_mqar

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda")
BATCH, D_MODEL = 128, 128  # of both
LENGTH, PAIRS, LAYERS = 512, 32, 4  # of MQAR
TRAIN, TEST = 20 * BATCH, 1000  # examples of a timed epoch, and of scoring
PAPER_TRAIN = 20_000  # examples of an epoch of the paper
MAD_EPOCHS = 5  # that are timed; an epoch of ours takes a fraction of a second
RECALL = MADTask(task="in-context-recall")
SIDES = {"ours": ("fp32", True), "ours tf32": ("tf32", True), "ours bf16": ("bf16", True),
         "ours, no graph": ("fp32", False)}  # side: its precision, and whether the step is captured  # fmt: skip
PACKED = {"mixers": ["baseconv"], "lengths": {256: 16}, "d_models": [64], "variants": ["resona0"]}
PACKED_SETTINGS = {"batch_size": 256, "max_epochs": 12, "target_accuracy": None, "generator": "fast",
                   "precision": "tf32"}  # fmt: skip

Run = MQARRun | MADRun


@dataclass(frozen=True)
class Benchmark:
    """One task, and the trainer that ours is compared with on it."""

    reference: str
    their_seconds: Callable[[Any, int], Seconds]  # of a run, and how many epochs are timed
    make_run: Callable[[str, str], Run]  # of a mixer and a precision
    splits: Callable[[Any], Splits]
    code_modules: Callable[[Any], list[str]]
    source: str  # of the data
    num_train: int  # examples of a timed epoch
    paper_train: int  # examples of an epoch of the paper
    epochs: int  # that are timed
    config: dict[str, Any]  # of the rows, beside the mixer and the side


def mqar_run(mixer: str, precision: str) -> MQARRun:
    (run,) = mqar_runs(
        mixers=[mixer], lengths={LENGTH: PAIRS}, d_models=[D_MODEL], variants=["base"], learning_rates=[1e-3],
        mixer_args={"attention": {"num_heads": 1}} if mixer == "attention" else None,
        settings={"num_train": TRAIN, "num_valid": TEST, "num_test": TEST, "batch_size": BATCH, "max_epochs": 16,
                  "generator": "fast", "precision": precision, "num_layers": LAYERS},
    )  # fmt: skip
    return run


def mad_run(mixer: str, precision: str) -> MADRun:
    (run,) = mad_runs(
        mixers=[mixer], tasks=[RECALL], variants=["base"], learning_rates=[5e-4], weight_decays=[0.0],
        settings={"d_model": D_MODEL, "batch_size": BATCH, "precision": precision},
    )  # fmt: skip
    return run


MQAR = Benchmark(
    "zoology", zoology, mqar_run, synthetic.mqar_splits, synthetic.code_modules,
    "lrm_recall.tasks.mqar", TRAIN, PAPER_TRAIN, 1,
    {"task": "train", "length": LENGTH, "d_model": D_MODEL, "batch_size": BATCH},
)  # fmt: skip
MAD = Benchmark(
    "mad-lab", mad_lab, mad_run, mad.mad_splits, mad.code_modules,
    "lrm_recall.tasks.mad", RECALL.num_train_examples, RECALL.num_train_examples, MAD_EPOCHS,
    {"task": "train", "benchmark": "mad", "length": RECALL.seq_len, "d_model": D_MODEL, "batch_size": BATCH},
)  # fmt: skip


def our_seconds(benchmark: Benchmark, mixer: str, precision: str, captured: bool) -> tuple[Seconds, float]:
    """Our loop, replayed or kernel by kernel; and the seconds until it stands."""
    run = benchmark.make_run(mixer, precision)
    with own_stream(GPU):
        settings, splits = run.to_fit_settings(), benchmark.splits(run).to(GPU)
        model = initial_model(run.to_model_config(), run.seed).to(GPU)
        start = now()
        if captured:
            loop: GraphLoop | PlainLoop = GraphLoop(settings, model, splits, logits_of_questions)
        else:
            loop = PlainLoop(settings, model, splits.train, logits_of_questions,
                             functools.partial(turn, precision))  # fmt: skip
        setup = now() - start
        return timed(loop.epoch, lambda: loop.predict(splits.test), benchmark.epochs), setup


def measure(benchmark: Benchmark, mixer: str, side: str) -> dict[str, float]:
    """The metrics of a row."""
    if side in SIDES:
        seconds, setup = our_seconds(benchmark, mixer, *SIDES[side])
        extra = {"setup_s": setup}
    else:
        seconds, extra = benchmark.their_seconds(benchmark.make_run(mixer, "fp32"), benchmark.epochs), {}
    per_s = benchmark.num_train / BATCH / seconds.epoch
    paper_epoch = benchmark.paper_train / BATCH / per_s
    return {"steps_per_s": per_s, "score_s": seconds.score, "epoch_s": paper_epoch + seconds.score, **extra}


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


class Rows:
    """Writes rows of results."""

    def __init__(self, profile: str) -> None:
        self._profile, self._machine = profile, machine()
        self.store = ResultStore(profile_path(ROOT / "outputs" / "results", "bench", profile))

    def add(self, config: dict[str, Any], code: list[str], data: str, metrics: dict[str, float], begin: float) -> None:
        self.store.append(make_row(
            experiment="bench_gpu_synthetic", config={**config, "autotune": autotune.mode()}, seed=0,
            data={"source": data, "revision": "generated"}, code=code_hash(code), profile=self._profile,
            machine=self._machine, metrics=metrics, runtime_s=time.perf_counter() - begin,
            peak_memory_mb=torch.cuda.max_memory_allocated() / 1e6,
        ))  # fmt: skip


def compare(benchmark: Benchmark, mixers: list[str], with_reference: bool, rows: Rows) -> None:
    """Measure every side on every mixer, and tell how many times faster ours is."""
    sides = [*SIDES, benchmark.reference] if with_reference else list(SIDES)
    for mixer in mixers:
        found: dict[str, float] = {}
        for side in sides:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            try:
                metrics = measure(benchmark, mixer, side)
            except Exception as error:  # a side that cannot run leaves the others their rows
                print(f"{mixer:10} {side:14} failed: {type(error).__name__}: {error}", flush=True)
                continue
            found[side] = metrics["steps_per_s"]
            code = benchmark.code_modules(benchmark.make_run(mixer, "fp32"))
            rows.add({**benchmark.config, "mixer": mixer, "side": side}, code, benchmark.source, metrics, begin)
            print(f"{mixer:10} {side:14} {metrics['steps_per_s']:8.1f} steps/s  {metrics['epoch_s']:7.2f} s/epoch  "
                  f"scoring {metrics['score_s']:6.3f} s", flush=True)
        if theirs := found.pop(benchmark.reference, None):
            ratios = ", ".join(f"{side} {steps / theirs:.1f} x" for side, steps in found.items())
            print(f"{mixer:10} {ratios} {benchmark.reference}", flush=True)


def pack(workers: list[int], rows: Rows) -> None:
    """Measure whole runs side by side."""
    (run,) = mqar_runs(**PACKED, learning_rates=[1e-2], settings=PACKED_SETTINGS)
    for index, number in enumerate([1, *workers] if workers else []):
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        metrics = packed(number)
        if index == 0:  # kernels compiled, data made
            continue
        config = {"task": "packing", "workers": number, "mixer": run.mixer, "variant": run.variant, "length": 256,
                  "d_model": 64, "epochs": run.max_epochs}  # fmt: skip
        rows.add(config, synthetic.code_modules(run), "lrm_recall.tasks.mqar", metrics, begin)
        print(f"{number:3} at once  {metrics['runs_per_hour']:8.0f} runs/hour  {metrics['steps_per_s']:8.0f} steps/s  "
              f"{metrics['run_s']:6.2f} s a run", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--zoology", type=Path, help="folder that holds the package zoology; without it, ours alone")
    parser.add_argument("--mixers", nargs="*", default=list(ZOOLOGY), help=f"of MQAR: {', '.join(ZOOLOGY)} (all)")
    parser.add_argument("--mad", type=Path, help="folder that holds the package mad; without it, no MAD")
    parser.add_argument("--mad-mixers", nargs="*", default=list(MAD_LAB), help=f"of MAD: {', '.join(MAD_LAB)} (all)")
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 4, 8, 16], help="threads (default: 1 4 8 16)")
    arguments = parser.parse_args()
    for chosen, known in ((arguments.mixers, ZOOLOGY), (arguments.mad_mixers, MAD_LAB)):
        if unknown := set(chosen) - set(known):  # argparse's `choices` refuses an empty list
            parser.error(f"unknown mixers {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    for path, package in ((arguments.zoology, "zoology"), (arguments.mad, "mad")):
        if path and not (path / package).is_dir():
            parser.error(f"{path} holds no folder {package}")
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    if arguments.zoology:
        import_zoology(arguments.zoology.resolve())
    if arguments.mad:
        import_mad(arguments.mad.resolve())
    autotune.apply()
    rows = Rows(arguments.profile)
    compare(MQAR, arguments.mixers, arguments.zoology is not None, rows)
    if arguments.mad:
        compare(MAD, arguments.mad_mixers, True, rows)
    pack(arguments.workers, rows)
    print(f"rows added to {rows.store.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
