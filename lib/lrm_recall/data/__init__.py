"""Corpora of real text: from the hub or an offline source, tokenised once, memory-mapped.

    from lrm_recall.data import Packed, corpus, prepare

    prepared = prepare(corpus("wikitext103", source="auto", max_articles=1000))
    prepared.source, prepared.splits["train"]               # which source was used; a datasets.Dataset
    Packed(prepared, "train", length=1024)[0]["input_ids"]  # [1024] int64

The names are imported when first used: the command line does not wait for torch and datasets.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "CORPORA": "lrm_recall.data.corpora",
    "Articles": "lrm_recall.data.sequences",
    "Corpus": "lrm_recall.data.corpora",
    "DataError": "lrm_recall.data.errors",
    "Packed": "lrm_recall.data.sequences",
    "Prepared": "lrm_recall.data.prepared",
    "boundaries": "lrm_recall.data.sequences",
    "corpus": "lrm_recall.data.corpora",
    "load_tokenizer": "lrm_recall.data.tokenizer",
    "prepare": "lrm_recall.data.preparation",
    "read_corpus": "lrm_recall.data.corpora",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
