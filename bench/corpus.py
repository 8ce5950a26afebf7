"""How long a corpus takes to be tokenised and to be loaded again, and the memory of it, beside `datasets`' own way.

Sides, each in a process of its own (imports are not timed; what they take of memory is counted):

    prepare     ours: read, split by article, tokenise, count words, write, checksum
    load        ours again: read the manifest, check every file's SHA-256, map it
    datasets.map, datasets.map on N processes
                what one would write instead: the same articles and tokenizer, `Dataset.map(..., batched=True)` into
                Arrow files; neither split nor checked

All give the same tokens, or the benchmark fails. Memory is the peak of the main process. Rows go to
outputs/results/bench.<profile>.jsonl; the table of docs/evaluation.md comes from them.

    python bench/corpus.py --profile laptop
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from lrm_recall.code_hash import code_hash
from lrm_recall.data import Corpus, corpus, prepare
from lrm_recall.data.offline import PACKAGED
from lrm_recall.data.tokenizer import load_tokenizer
from lrm_recall.figures.tables import markdown
from lrm_recall.provenance import machine
from lrm_recall.results import ResultStore, make_row, profile_path
from lrm_recall.rows import Row
from lrm_recall.train.memory import peak_mb, reset_peak

ROOT = Path(__file__).resolve().parents[1]
CODE = ("lrm_recall.data.preparation",)
CPU = torch.device("cpu")


def ours(asked: Corpus, fresh: bool) -> dict[str, float]:
    """`prepare`, from the start or from the cache."""
    next(asked.choose().articles())  # fetched, and all imported, before the clock starts
    load_tokenizer()

    def work() -> int:
        return sum(split["tokens"] for split in prepare(asked, fresh=fresh).manifest["splits"].values())

    return timed(work)


def theirs(asked: Corpus, processes: int) -> dict[str, float]:
    """`Dataset.map` with the same tokenizer over the same articles."""
    from datasets import Dataset

    tokenizer, source = load_tokenizer(), asked.choose()
    next(source.articles())

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list]:
        ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return {"input_ids": ids, "tokens": list(map(len, ids))}

    def work() -> int:
        articles = Dataset.from_list([{"title": title, "text": text} for title, text in source.articles()])
        with tempfile.TemporaryDirectory() as folder:
            mapped = articles.map(tokenise, batched=True, num_proc=processes if processes > 1 else None,
                                  cache_file_name=str(Path(folder, "tokens.arrow")))  # fmt: skip
            return sum(mapped["tokens"])

    return timed(work)


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Seconds and peak memory (MB) of some work that returns the number of tokens."""
    reset_peak(CPU)
    start = time.perf_counter()
    tokens = work()
    return {"seconds": time.perf_counter() - start, "peak_mb": peak_mb(CPU), "tokens": tokens}


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """One line a side; of rows of one side the last counts."""
    found = {row["config"]["side"]: row["metrics"] for row in rows if row["experiment"] == "bench_corpus"}
    return pd.DataFrame([
        {"way": side, "seconds": f"{metrics['seconds']:.2g}", "peak memory": f"{metrics['peak_mb']:.0f} MB",
         "tokens": f"{metrics['tokens']:,.0f}"}
        for side, metrics in found.items()
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--corpus", default="hotpotqa", choices=PACKAGED, help="an offline source (default: hotpotqa)")
    arguments = parser.parse_args()
    asked, processes = corpus(arguments.corpus), os.cpu_count() or 1
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # of all sides: the tokenizer takes every core by itself
    sides = {
        "prepare": partial(ours, asked, True),
        "load": partial(ours, asked, False),
        "datasets.map": partial(theirs, asked, 1),
        f"datasets.map, {processes} processes": partial(theirs, asked, processes),
    }
    results = {}
    for side, work in sides.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            results[side] = process.submit(work).result()
    if len({result["tokens"] for result in results.values()}) > 1:
        raise ValueError(f"the sides differ in their tokens: {results}")
    prepared = prepare(asked)
    rows = [
        make_row(
            experiment="bench_corpus", config={"corpus": arguments.corpus, "side": side, "tokenizer": "gpt2"}, seed=0,
            data={"source": prepared.source, "revision": prepared.revision}, code=code_hash(CODE),
            profile=arguments.profile, machine=machine(), metrics=metrics, runtime_s=metrics["seconds"],
            peak_memory_mb=metrics["peak_mb"],
        )  # fmt: skip
        for side, metrics in results.items()
    ]
    store = ResultStore(profile_path(ROOT / "outputs" / "results", "bench", arguments.profile))
    for row in rows:
        store.append(row)
    print(markdown(table(rows)))
    print(f"rows added to {store.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
