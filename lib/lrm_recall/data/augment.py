"""Articles extended by text about themselves, so that there is something to look up (Resona, section 4.2.2).

    augmented = augment(prepare(corpus("hotpotqa")), Recap(questions=4))       # without a model
    augmented = augment(prepared, Written(model="meta-llama/Llama-3.1-70B-Instruct"))
    augmented = augment(prepared, read_augmentation({"kind": "recap", "questions": 4}))

The result is a prepared corpus like any other; its source says what was done to which splits. Every article is extended
from its own text alone, after splitting, so no text of a test article can reach training. The other splits stay as
they are, to the byte: perplexity on them means the same with and without augmentation of training.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from lrm_recall.code_hash import code_hash
from lrm_recall.data.articles import Article
from lrm_recall.data.augment_recap import Recap
from lrm_recall.data.augment_written import Written
from lrm_recall.data.errors import DataError
from lrm_recall.data.prepared import MANIFEST, Prepared, folder, write_manifest
from lrm_recall.data.store import locked, published
from lrm_recall.data.tokenise import FORMAT, write_split
from lrm_recall.data.tokenizer import fingerprint, load_tokenizer
from lrm_recall.options import accepted_options, check_options, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS: dict[str, type] = {"recap": Recap, "written": Written}
_AT_ONCE = 256  # articles handed to an augmentation together


class Augmentation(Protocol):
    """What extends articles."""

    kind: str

    def identity(self) -> dict[str, Any]:
        """All that decides the additions; goes into the key and the manifest."""
        ...

    def extend(self, articles: Sequence[Article]) -> list[str]:
        """What is put behind each article; an empty text for nothing."""
        ...


def read_augmentation(values: Any) -> Augmentation:
    """The augmentation that a parameter file names: a mapping with a kind and options.

    Raises:
        DataError: unknown kind or option, or a value that is not allowed.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
        raise DataError(f"an augmentation must be a mapping with a kind and options, got {values!r:.80}")
    options = dict(values)
    kind = options.pop("kind")
    if kind not in KINDS:
        raise DataError(f"unknown augmentation {kind!r}{did_you_mean(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    accepted = accepted_options(KINDS[kind])
    if needed := [name for name, option in accepted.items() if option.default is option.empty and name not in options]:
        raise DataError(f"augmentation {kind!r} lacks {', '.join(needed)}")
    try:
        check_options(KINDS[kind], options, f"augmentation {kind!r}")
        return KINDS[kind](**options)
    except ValueError as error:
        raise DataError(str(error)) from None


def augment(
    prepared: Prepared,
    augmentation: Augmentation,
    *,
    splits: Sequence[str] = ("train",),
    progress: bool = False,
    fresh: bool = False,
) -> Prepared:
    """A corpus whose articles are extended: from the cache, or made now.

    Two processes that ask at once make it once; a killed one leaves nothing that counts but the additions that a model
    has written.

    Args:
        prepared: the corpus as it is.
        augmentation: a Recap or Written.
        splits: which splits are extended; the others are copied.
        progress: show a bar on stderr.
        fresh: put it together again although it is there; additions that a model has written stay.

    Raises:
        DataError: unknown split, no tokenizer or model, a full disk.
    """
    unknown = [split for split in splits if split not in prepared.manifest["splits"]]
    if unknown or not splits or isinstance(splits, str):
        raise DataError(f"splits must be some of {', '.join(prepared.manifest['splits'])}, got {splits!r}")
    key = {
        "base": prepared.manifest["key"] | {"revision": prepared.revision},
        "augmentation": augmentation.identity(),
        "splits": sorted(splits),
        "format": FORMAT,
        "code": code_hash((type(augmentation).__module__, "lrm_recall.data.tokenise")),
    }
    place = folder(f"{prepared.manifest['corpus']}-{augmentation.kind}", key)
    if fresh or not (place / MANIFEST).is_file():
        with locked(place):
            if fresh or not (place / MANIFEST).is_file():
                _make(prepared, augmentation, key, place, progress)
    return Prepared(place)


def _make(
    prepared: Prepared, augmentation: Augmentation, key: Mapping[str, Any], place: Path, progress: bool
) -> None:
    """Write the folder of an augmented corpus. Needs its lock."""
    start = time.monotonic()
    base, chosen = prepared.manifest, key["splits"]
    tokenizer = _tokenizer(prepared)
    counts: dict[str, dict[str, Any]] = {}
    extended: dict[str, int] = {}
    total = sum(base["splits"][split]["articles"] for split in chosen)
    bar = tqdm(total=total, desc=place.name.rpartition("-")[0], unit=" articles", file=sys.stderr,
               disable=not progress, leave=False)  # fmt: skip
    with bar, published(place) as partial:
        for split, known in base["splits"].items():
            file = partial / f"{split}.arrow"
            if split in chosen:
                articles = _extended(prepared, split, augmentation, extended)
                counts[split] = write_split(file, articles, tokenizer, lambda n, _: bar.update(n))
            else:
                shutil.copyfile(prepared.path / file.name, file)
                counts[split] = {name: value for name, value in known.items() if name != "sha256"}
        write_manifest(partial, {
            **{name: base[name] for name in ("source_revision", "tokenizer", "dropped")},
            "corpus": f"{base['corpus']}-{augmentation.kind}",
            "source": f"{base['source']} + {augmentation.kind} of {', '.join(chosen)}",
            "augmentation": augmentation.identity() | {"base": prepared.revision, "extended_articles": extended},
            "splits": counts,
            "key": key,
            "seconds": round(time.monotonic() - start, 1),
        })  # fmt: skip


def _extended(
    prepared: Prepared, split: str, augmentation: Augmentation, extended: dict[str, int]
) -> Iterator[Article]:
    """The articles of a split with what is put behind them; `extended` counts those that got something."""
    extended[split] = 0
    for rows in prepared.splits[split].select_columns(["title", "text"]).iter(_AT_ONCE):
        articles = [Article(*row) for row in zip(rows["title"], rows["text"], strict=True)]
        for article, addition in zip(articles, augmentation.extend(articles), strict=True):
            extended[split] += bool(addition)
            yield article._replace(text=f"{article.text}\n{addition}") if addition else article


def _tokenizer(prepared: Prepared) -> PreTrainedTokenizerBase:
    """The tokenizer that the corpus was prepared with.

    Raises:
        DataError: it cannot be had, or has become another one.
    """
    known = prepared.manifest["tokenizer"]
    tokenizer = load_tokenizer(known["name"], _find(prepared.manifest["key"], "tokenizer").get("revision"))
    if fingerprint(tokenizer) != known["sha256"]:
        raise DataError(f"the tokenizer {known['name']} is no longer the one that {prepared.path.name} was made with")
    return tokenizer


def _find(key: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of the key of a corpus, which may be the key of an augmented one."""
    while name not in key:
        key = key["base"]
    return json.loads(json.dumps(key[name]))
