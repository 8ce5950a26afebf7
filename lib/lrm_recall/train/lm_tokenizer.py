"""A small tokenizer of a corpus' own: GPT-2's 50,257 tokens would be most of a model of three million parameters.

Byte-level BPE, as GPT-2's, trained on the training split alone and kept in the cache as a directory that `transformers`
loads, under a hash of the corpus and the size. Compare models with different tokenizers by perplexity by word.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from lrm_recall.data.corpora import Corpus
from lrm_recall.data.errors import DataError
from lrm_recall.data.hub import Hub
from lrm_recall.data.preparation import prepare
from lrm_recall.data.store import cache_root, locked, published
from lrm_recall.provenance import version

_END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_DONE = "tokenizer.json"


def own_tokenizer(corpus: Corpus, tokens: int) -> Path:
    """The directory of a tokenizer with this many tokens for a corpus; trained unless it is there.

    Raises:
        DataError: too few tokens to spell every byte, or more than the training split gives, or the corpus cannot be
            had.
    """
    if tokens <= _BYTES:
        raise DataError(f"a tokenizer of a corpus' own needs at least {_BYTES + 1} tokens (every byte, and the end of "
                        f"text), got {tokens}")
    folder = cache_root() / "tokenizers"
    place = folder / f"{corpus.name}-{_key(corpus)}-{tokens}"
    if not (place / _DONE).is_file():
        with locked(folder / corpus.name), locked(place):
            if not (place / _DONE).is_file():
                _make(corpus, tokens, place)
    return place


def _key(corpus: Corpus) -> str:
    """Names what decides the training split."""
    source = corpus.choose()
    content = dataclasses.asdict(source) if isinstance(source, Hub) else source.sha256()
    values = [content, corpus.validation, corpus.test, corpus.split_seed, corpus.max_articles, corpus.drop_empty,
              version("tokenizers")]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _make(corpus: Corpus, tokens: int, place: Path) -> None:
    """Train into `place`. The training split is had by preparing the corpus with a tokenizer of bytes, for a moment."""
    letters = place.with_name(f"{corpus.name}-bytes")
    shutil.rmtree(letters, ignore_errors=True)
    try:
        _save(_trained([], _BYTES + 1), letters)
        prepared = prepare(dataclasses.replace(corpus, tokenizer=str(letters), tokenizer_revision=None))
        tokenizer = _trained(prepared.splits["train"]["text"], tokens)
        shutil.rmtree(prepared.path, ignore_errors=True)
    finally:
        shutil.rmtree(letters, ignore_errors=True)
    if tokenizer.get_vocab_size() != tokens:
        raise DataError(f"the training split of {corpus.name} gives {tokenizer.get_vocab_size():,} tokens, not "
                        f"{tokens:,}; ask for a smaller vocabulary")
    with published(place) as partial:
        _save(tokenizer, partial)


def _trained(texts, tokens: int):
    """A byte-level BPE (tokenizers.Tokenizer) trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[_END_OF_TEXT],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save(tokenizer, place: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END_OF_TEXT).save_pretrained(place)
