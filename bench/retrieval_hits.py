"""How often TF-IDF finds the chunk that holds the answer to a question about the article, by the window it asks with.

Every article is extended by a recap (`lrm_recall.data.augment_recap`): sentences of it asked again with a name or
number left out that the article has once. At the position before the answer, the last w tokens ask for chunks that lie
wholly before. Chance is one over the chunks that can be seen. Rows go to outputs/results/bench.<profile>.jsonl; the
table of docs/evaluation.md comes from them.

    python bench/retrieval_hits.py --profile laptop
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lrm_recall.code_hash import code_hash
from lrm_recall.data import Prepared, corpus, prepare
from lrm_recall.data.articles import Article
from lrm_recall.data.augment_recap import ANSWER, Recap
from lrm_recall.data.retrieval import ChunkFinder
from lrm_recall.data.retrieval_encoders import tf_idf
from lrm_recall.figures.retrieval_hits import retrieval_hits_table
from lrm_recall.figures.tables import markdown
from lrm_recall.provenance import machine
from lrm_recall.resona.search import visible_chunks
from lrm_recall.results import ResultStore, make_row, profile_path
from lrm_recall.rows import Row
from lrm_recall.train.lm_data import tokenizer_of

ROOT = Path(__file__).resolve().parents[1]
CASES = [("squad", 32), ("squad", 64), ("squad", 256), ("essays", 64), ("long_documents", 64)]
WINDOWS = [4, 8, 16, 24, 32, 64]
BEST = 4  # chunks
CODE = ("lrm_recall.data.retrieval", "lrm_recall.data.augment_recap")


class Question(NamedTuple):
    """Where a question ends, and where its answer stands in the article, in tokens."""

    asked: int
    answered: int


def articles(prepared: Prepared, count: int) -> Iterator[tuple[Tensor, list[Question]]]:
    """Ids [T] of the first training articles that have questions, each with its recap, and the questions."""
    tokenizer, recap = tokenizer_of(prepared), Recap(questions=4)
    for row in prepared.splits["train"]:
        if not count:
            return
        (tail,) = recap.extend([Article(row["title"], row["text"])])
        if not tail:
            continue
        count -= 1
        text = f"{row['text']}\n{tail}"
        encoded = tokenizer(text, return_offsets_mapping=True)
        starts = torch.tensor([start for start, _ in encoded["offset_mapping"]])
        questions, at = [], len(row["text"])
        for line in tail.split("\n"):
            at += 1  # the line break before it
            if line.startswith(ANSWER):
                place = int(torch.searchsorted(starts, at + len(ANSWER) - 1))  # the answer's token takes its space
                first = row["text"].index(line.removeprefix(ANSWER))
                questions.append(Question(place - 1, int(torch.searchsorted(starts, first, right=True)) - 1))
            at += len(line)
        yield torch.tensor(encoded["input_ids"]), questions


def measure(prepared: Prepared, chunk_size: int, count: int, window: int) -> dict[str, float]:
    """Shares of the questions whose answer is found, and seconds a million tokens."""
    finder = ChunkFinder(encoder=tf_idf(prepared, window=window), chunk_size=chunk_size, top_k=BEST)
    best, best_four, chance, seconds, tokens = [], [], [], 0.0, 0
    for ids, questions in articles(prepared, count):
        start = time.perf_counter()
        indices = finder.find(ids)  # [T, k]
        seconds, tokens = seconds + time.perf_counter() - start, tokens + len(ids)
        for asked, answered in questions:
            visible = int(visible_chunks(torch.tensor([asked]), chunk_size))
            if answered // chunk_size < visible:  # else the article is too short for the answer to be looked up
                found = (indices[asked] == answered // chunk_size).tolist()
                best.append(found[0])
                best_four.append(any(found))
                chance.append(1 / visible)
    share = [sum(hits) / max(len(best), 1) for hits in (best, best_four, chance)]
    return {"questions": len(best), "best": share[0], "best_four": share[1], "chance": share[2],
            "s_per_million_tokens": 1e6 * seconds / max(tokens, 1)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="smoke", help="the file of results to add to (default: smoke)")
    parser.add_argument("--articles", type=int, default=60, help="of each corpus (default: 60)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = ResultStore(profile_path(ROOT / "outputs" / "results", "bench", arguments.profile))
    rows: list[Row] = []
    for name, chunk_size in CASES:
        prepared = prepare(corpus(name))
        for window in WINDOWS:
            start = time.perf_counter()
            metrics = measure(prepared, chunk_size, arguments.articles, window)
            rows.append(make_row(
                experiment="bench_retrieval_hits",
                config={"corpus": name, "chunk_size": chunk_size, "window": window, "articles": arguments.articles},
                seed=0, data={"source": prepared.source, "revision": prepared.revision}, code=code_hash(CODE),
                profile=arguments.profile, machine=machine(), metrics=metrics, runtime_s=time.perf_counter() - start,
            ))  # fmt: skip
            store.append(rows[-1])
    print(markdown(retrieval_hits_table(rows)))
    print(f"rows added to {store.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
