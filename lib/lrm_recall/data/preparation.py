"""From a corpus to its tokens: choose the source, tokenise once, keep the result.

Two processes that ask for the same corpus at once make it once; a killed one leaves nothing that counts.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

from lrm_recall.code_hash import code_hash
from lrm_recall.data.articles import Article
from lrm_recall.data.corpora import Corpus
from lrm_recall.data.errors import DataError
from lrm_recall.data.hub import Hub
from lrm_recall.data.offline import Offline
from lrm_recall.data.prepared import MANIFEST, Prepared, folder, write_manifest
from lrm_recall.data.splits import SPLITS, check_not_empty, fingerprints, split_articles, without
from lrm_recall.data.store import locked, published
from lrm_recall.data.tokenise import FORMAT, write_split
from lrm_recall.data.tokenizer import check_vocabulary, fingerprint, identity, load_tokenizer
from lrm_recall.provenance import version

_CODE = ("lrm_recall.data.readers", "lrm_recall.data.splits", "lrm_recall.data.tokenise")


def prepare(corpus: Corpus, *, vocab_size: int | None = None, progress: bool = False, fresh: bool = False) -> Prepared:
    """The tokenised corpus: from the cache, or made now.

    Args:
        vocab_size: of the model that will read it; None: no model yet.
        progress: show a bar on stderr.
        fresh: make it again although it is there.

    Raises:
        DataError: its source cannot be had, a checksum is wrong, an article is empty, the disk is full, or the
            tokenizer has more tokens than the model. Nothing half-written stays.
    """
    source, key = _choose(corpus)
    place = folder(corpus.name, key)
    if fresh or not (place / MANIFEST).is_file():
        with locked(place, lambda: _say(f"{corpus.name}: another process prepares it; waiting", progress)):
            if fresh or not (place / MANIFEST).is_file():
                _make(corpus, source, key, vocab_size, progress)
    prepared = Prepared(place)
    check_vocabulary(prepared.vocab_size, vocab_size, corpus.tokenizer)
    return prepared


def _choose(corpus: Corpus) -> tuple[Hub | Offline, dict[str, Any]]:
    """The source that is used, and all that decides the result. What the hub once gave needs no network again."""
    tokenizer = identity(corpus.tokenizer, corpus.tokenizer_revision)
    if corpus.hub is not None and corpus.source != "offline":
        key = _key(corpus, corpus.hub, tokenizer)
        if (folder(corpus.name, key) / MANIFEST).is_file():
            return corpus.hub, key
    source = corpus.choose()
    return source, _key(corpus, source, tokenizer)


def _key(corpus: Corpus, source: Hub | Offline, tokenizer: dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, Hub):
        content: dict[str, Any] = {"hub": dataclasses.asdict(source)}
    else:
        content = {"offline": source.label, "sha256": source.sha256(), "validation": corpus.validation,
                   "test": corpus.test, "split_seed": corpus.split_seed}
    return {
        **content,
        "max_articles": corpus.max_articles,
        "drop_empty": corpus.drop_empty,
        "tokenizer": tokenizer,
        "tokenizers": version("tokenizers"),
        "format": FORMAT,
        "code": code_hash(_CODE),
    }


def _make(corpus: Corpus, source: Hub | Offline, key: dict[str, Any], vocab_size: int | None, progress: bool) -> None:
    """Write the folder of a corpus. Needs its lock."""
    start = time.monotonic()
    _say(f"{corpus.name}: from {source.label}", progress)
    tokenizer = load_tokenizer(corpus.tokenizer, key["tokenizer"].get("revision"))
    check_vocabulary(len(tokenizer), vocab_size, corpus.tokenizer)
    dropped = Counter(empty=0, also_held_out=0)
    splits, total = _splits(corpus, source, dropped)
    counts = {}
    bar = tqdm(total=total, desc=corpus.name, unit=" articles", file=sys.stderr, disable=not progress, leave=False)
    with bar, published(folder(corpus.name, key)) as place:
        for name, articles in splits:
            bar.set_postfix_str(name)
            counts[name] = write_split(place / f"{name}.arrow", articles, tokenizer, lambda n, _: bar.update(n))
            if not counts[name]["articles"]:
                raise DataError(f"{source.label} has no articles for the split {name}")
        write_manifest(place, {
            "corpus": corpus.name,
            "source": source.label,
            "source_revision": source.revision if isinstance(source, Hub) else source.sha256(),
            "tokenizer": {
                "name": corpus.tokenizer,
                "origin": tokenizer.origin,
                "sha256": fingerprint(tokenizer),
                "tokens": len(tokenizer),
                "end_of_text": tokenizer.eos_token_id,
            },
            "splits": {name: counts[name] for name in SPLITS if name in counts},
            "dropped": dict(dropped),
            "key": key,
            "seconds": round(time.monotonic() - start, 1),
        })  # fmt: skip


def _splits(
    corpus: Corpus, source: Hub | Offline, dropped: Counter
) -> tuple[Iterable[tuple[str, Iterable[Article]]], int | None]:
    """The splits, each with its articles, and how many articles there are, if that is known."""

    def full(articles: Iterable[Article]) -> Iterator[Article]:
        return check_not_empty(articles, corpus.drop_empty, lambda: dropped.update(empty=1))

    if isinstance(source, Hub):
        return _hub_splits(source, full, corpus.max_articles, dropped), None
    splits = split_articles(
        list(full(source.articles())), validation=corpus.validation, test=corpus.test, seed=corpus.split_seed,
        max_articles=corpus.max_articles,
    )
    return splits.items(), sum(map(len, splits.values()))


def _hub_splits(
    source: Hub, full: Callable[[Iterable[Article]], Iterator[Article]], max_articles: int | None, dropped: Counter
) -> Iterator[tuple[str, Iterable[Article]]]:
    """The hub's own splits, train last: it leaves out what the other two hold."""
    held_out: set[str] = set()
    splits = source.splits()

    def noted(articles: Iterable[Article]) -> Iterator[Article]:
        for article in articles:
            held_out.update(fingerprints(article))
            yield article

    for name in ("test", "validation"):
        yield name, _first(noted(full(splits[name])), max_articles)
    train = without(full(splits["train"]), held_out, lambda: dropped.update(also_held_out=1))
    yield "train", _first(train, max_articles)


def _first(articles: Iterable[Article], count: int | None) -> Iterator[Article]:
    for number, article in enumerate(articles, start=1):
        yield article
        if number == count:
            return


def _say(line: str, progress: bool) -> None:
    if progress:
        tqdm.write(line, file=sys.stderr)
