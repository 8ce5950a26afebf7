"""A corpus of made-up articles and a run of a second or two on it, for the tests of language models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lrm_recall.data.prepared import Prepared
from lrm_recall.data.store import VARIABLE
from lrm_recall.train.language_model import LMRun
from lrm_recall.train.lm_data import prepared_corpus

VOCAB = 320


def write_articles(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Articles of 30 to 200 words, each with a few words of its own that come again and again."""
    chance = random.Random(seed)
    common = [f"word{i}" for i in range(60)]
    with path.open("w") as file:
        for number in range(count):
            own = [f"name{chance.randrange(10_000)}" for _ in range(3)]
            words = [chance.choice(own if chance.random() < 0.2 else common) for _ in range(chance.randrange(30, 200))]
            text = f"Article {number} on {own[0]}.\n" + " ".join(words)
            file.write(json.dumps({"title": f"Title {number}", "text": text}) + "\n")
    return path


def corpus_values(folder: Path) -> dict[str, Any]:
    return {"name": "small", "offline": str(folder / "articles.jsonl"), "validation": 0.1, "test": 0.1}


def small_cache(folder: Path, monkeypatch) -> dict[str, Any]:
    """A cache of its own with the articles in it; the values of the corpus."""
    monkeypatch.setenv(VARIABLE, str(folder / "cache"))
    write_articles(folder / "articles.jsonl")
    return corpus_values(folder)


def prepare_small(corpus: dict[str, Any]) -> Prepared:
    return prepared_corpus(corpus, VOCAB, True)


def small_run(corpus: dict[str, Any], **fields: Any) -> LMRun:
    values = {
        "mixer": "gla", "mixer_args": {"num_heads": 2}, "hidden_size": 16, "num_layers": 2, "intermediate_size": 32,
        "corpus": corpus, "own_tokenizer": True, "vocab_size": VOCAB, "length": 48, "steps": 12, "batch_size": 4,
        "log_every": 2, "eval_every": 4,
    }  # fmt: skip
    return LMRun(**(values | fields))


WITH_RESONA = {"variant": "resona", "resona": {"layers": [0, 1], "chunk_size": 8, "top_k": 2}}


def losses(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a history without the time that they took."""
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in history]
