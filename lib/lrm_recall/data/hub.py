"""Corpora on the Hugging Face hub, each pinned to a revision, read through `datasets`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lrm_recall.data.articles import Article, from_rows, from_wikitext
from lrm_recall.data.errors import DataError

_TIMEOUT_S = 10
_READ: dict[str, Callable[[Iterable[str]], Iterator[Article]]] = {"wikitext": from_wikitext, "rows": from_rows}


@dataclass(frozen=True)
class Hub:
    """A data set of the hub.

    Attributes:
        repo: owner/name.
        revision: a commit, so that the same name always gives the same data.
        config: the data set's configuration.
        files: split -> pattern of the files in the repository; without it all files of a split are read.
        articles: "wikitext" for rows that are lines, "rows" for rows that are articles.
        column: holds the text.
    """

    repo: str
    revision: str
    config: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    articles: str = "rows"
    column: str = "text"

    def __post_init__(self) -> None:
        if self.articles not in _READ:
            raise DataError(f"hub articles must be one of {', '.join(_READ)}, got {self.articles!r}")

    @property
    def label(self) -> str:
        return f"hub:{self.repo}" + (f"/{self.config}" if self.config else "")

    def splits(self) -> dict[str, Iterable[Article]]:
        """The articles of each split; read from the network as they are asked for, train not held in memory."""
        return {name: self._read(name) for name in ("train", "validation", "test")}

    def _read(self, split: str) -> Iterator[Article]:
        import datasets

        try:
            rows = datasets.load_dataset(
                self.repo, self.config, revision=self.revision, split=split, streaming=True,
                data_files=dict(self.files) or None,
            )
            yield from _READ[self.articles](row[self.column] for row in rows)
        except Exception as error:  # of the hub's client, its HTTP library, fsspec, pyarrow: dozens of kinds
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"the hub answered, but reading {self.repo}, {split}, failed "
                            f"({type(error).__name__}: {reason}); start again, or set source: offline") from error


@functools.cache
def no_answer(repo: str, revision: str, kind: str = "dataset") -> str | None:
    """Why the hub cannot be asked for a repository; None when it answers and has it. Asked once a process.

    Raises:
        DataError: the hub answers that it does not give this repository or revision: a mistake that another source
            must not hide.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    info: Callable[..., Any] = api.dataset_info if kind == "dataset" else api.model_info
    try:
        info(repo, revision=revision, timeout=_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:  # gated ones are among the first
        raise DataError(f"the hub does not give {repo} at revision {revision} ({type(error).__name__}); check the "
                        "name and your access, or set source: offline") from None
    except Exception as error:  # no network, no name server, a proxy that refuses, offline mode: dozens of kinds
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None
