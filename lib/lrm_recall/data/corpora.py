"""Corpora: what a parameter file names.

    corpus:
      name: wikitext103
      source: auto
      max_articles: 2000
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrm_recall.data.errors import DataError
from lrm_recall.data.hub import Hub, no_answer
from lrm_recall.data.offline import PACKAGED, Offline, find_offline
from lrm_recall.options import check_type, did_you_mean

SOURCES = ("auto", "hub", "offline")


@dataclass(frozen=True)
class Corpus:
    """A corpus and how it is prepared.

    Attributes:
        name: names its folder in the cache.
        hub: the data set of the hub; None: it has none.
        offline: name of an offline source, or path of a .jsonl file; None: it has none.
        source: "hub", "offline", or "auto": the hub when it answers, otherwise the offline source.
        tokenizer: "gpt2", a repository of the hub, or a directory.
        tokenizer_revision: a commit of the tokenizer's repository; None: the newest that is known.
        validation, test: shares of an offline source's articles; the hub's data sets have splits of their own.
        split_seed: which articles of an offline source these are.
        max_articles: the most articles that are used: of an offline source in all, of the hub the first of each split.
        drop_empty: leave out articles with no text instead of refusing them.
    """

    name: str
    hub: Hub | None = None
    offline: str | None = None
    source: str = "auto"
    tokenizer: str = "gpt2"
    tokenizer_revision: str | None = None
    validation: float = 0.02
    test: float = 0.02
    split_seed: int = 0
    max_articles: int | None = None
    drop_empty: bool = False

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise DataError(f"corpus {self.name!r}: source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if not self.name or not all(part.isalnum() for part in self.name.replace("-", "_").split("_")):
            raise DataError(f"a corpus's name must be made of letters, digits, - and _, got {self.name!r}")
        for share in ("validation", "test"):
            if not 0 <= getattr(self, share) < 1:
                raise DataError(f"corpus {self.name!r}: {share} must be in [0, 1), got {getattr(self, share)}")
        if self.validation + self.test >= 1:
            raise DataError(f"corpus {self.name!r}: validation {self.validation} and test {self.test} leave nothing "
                            "to train on")
        if self.max_articles is not None and self.max_articles < 1:
            raise DataError(f"corpus {self.name!r}: max_articles must be at least 1 or null, got {self.max_articles}")
        if self.hub is None and self.offline is None:
            raise DataError(f"corpus {self.name!r} names neither a data set of the hub nor an offline source")

    def choose(self) -> Hub | Offline:
        """The one source that is used. The two are never mixed.

        Raises:
            DataError: the source that is asked for is not named or, of the hub, does not answer.
        """
        if self.source == "offline" or self.hub is None:
            if self.source == "hub":
                raise DataError(f"corpus {self.name!r} is not on the hub; its offline source is {self.offline!r}")
            if self.offline is None:
                raise DataError(f"corpus {self.name!r} names no offline source; set offline to one of "
                                f"{', '.join(PACKAGED)}, or the path of a .jsonl file")
            return find_offline(self.offline)
        if (reason := no_answer(self.hub.repo, self.hub.revision)) is None:
            return self.hub
        if self.source == "hub" or self.offline is None:
            remedy = "it names no offline source" if self.offline is None else "source: hub allows no other"
            raise DataError(f"corpus {self.name!r}: the hub does not answer ({reason}), and {remedy}")
        return find_offline(self.offline)


_WIKITEXT = {
    "repo": "Salesforce/wikitext",
    "revision": "b08601e04326c79dfdd32d625aee71d232d685c3",
    "articles": "wikitext",
}
CORPORA = {
    known.name: known
    for known in (
        Corpus("wikitext103", Hub(config="wikitext-103-raw-v1", **_WIKITEXT), "hotpotqa", drop_empty=True),
        Corpus("wikitext2", Hub(config="wikitext-2-raw-v1", **_WIKITEXT), "squad", drop_empty=True),
        # 627 billion tokens in 59,166 files: a tenth of the first of ten parts is more than any run here reads
        Corpus(
            "slimpajama",
            Hub(
                "cerebras/SlimPajama-627B",
                "2d0accdd58c5d5511943ca1f5ff0e3eb5e293543",
                files={
                    "train": "train/chunk1/example_train_1*.jsonl.zst",
                    "validation": "validation/chunk1/example_holdout_1*.jsonl.zst",
                    "test": "test/chunk1/example_holdout_1*.jsonl.zst",
                },
            ),
            "long_documents",
            drop_empty=True,
        ),
        *(Corpus(name, offline=name) for name in PACKAGED),
    )
}


def corpus(name: str, **options: Any) -> Corpus:
    """A known corpus with some options changed, or a new one if `hub` or `offline` is given.

    Raises:
        DataError: unknown corpus or option, or a value that is not allowed.
    """
    if name not in CORPORA and not options.keys() & {"hub", "offline"}:
        raise DataError(f"unknown corpus {name!r}{did_you_mean(name, CORPORA)}; there are: {', '.join(CORPORA)}. "
                        "A corpus of your own needs hub or offline")
    options = dict(options)
    if isinstance(options.get("hub"), Mapping):
        options["hub"] = _build(Hub, options["hub"], f"corpus {name!r}: hub")
    base = dataclasses.asdict(CORPORA[name]) | {"hub": CORPORA[name].hub} if name in CORPORA else {"name": name}
    return _build(Corpus, base | options, f"corpus {name!r}")


def read_corpus(values: Any) -> Corpus:
    """The corpus that a parameter file names: a name, or a mapping with a name and options.

    Raises:
        DataError: as for `corpus`.
    """
    if isinstance(values, str):
        return corpus(values)
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise DataError(f"a corpus must be a name, or a mapping with a name and options, got {values!r:.80}")
    return corpus(**values)


def _build(kind: type, values: Mapping[str, Any], what: str) -> Any:
    """An instance of a dataclass from the values of a parameter file."""
    allowed = {field.name: field.type for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in allowed:
            hint = did_you_mean(str(name), allowed)
            raise DataError(f"{what} has no option {name!r}{hint}; allowed: {', '.join(allowed)}")
        try:
            check_type(value, hints[name], f"{what}: option {name!r}", allowed[name])
        except ValueError as error:
            raise DataError(str(error)) from None
    needed = [field.name for field in dataclasses.fields(kind) if _is_needed(field) and field.name not in values]
    if needed:
        raise DataError(f"{what} lacks {', '.join(needed)}")
    return kind(**values)


def _is_needed(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
