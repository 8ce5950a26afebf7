"""Sequences for a model, from the tokens of a split: packed to one length, or one article each.

    N sequences, T length; `articles` [T] is the number (row of the split) of the article that a token belongs to:
    where it changes, a mixer that may resets its state, and attention is cut. See `boundaries`.

A separator (the tokenizer's end of text) ends every article and belongs to it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrm_recall.data.errors import DataError
from lrm_recall.data.prepared import Prepared


class Packed(Dataset):
    """Articles one after the other, cut into sequences of one length: what one trains on.

    Item i is {"input_ids": [T] int64, "articles": [T] int64}.

    Args:
        prepared, split: the corpus.
        length: T.
        separator: ends every article; default: the tokenizer's end of text.
        seed: of the order of the articles; None keeps the source's.
        keep_last: whether the last, shorter sequence counts (to evaluate every token).

    Raises:
        DataError: unknown split, a length below 2 or above the number of tokens, or no separator.
    """

    def __init__(
        self, prepared: Prepared, split: str, length: int, *, separator: int | None = None, seed: int | None = None,
        keep_last: bool = False,
    ):
        self._tokens = _Tokens(prepared, split, separator)
        order = np.arange(len(self._tokens))
        self._order = order if seed is None else np.random.default_rng(seed).permutation(order)
        self._ends = np.cumsum(self._tokens.sizes[self._order])  # of each article in the stream
        total = int(self._ends[-1])
        if length < 2 or (length > total and not keep_last):
            raise DataError(f"length must be at least 2 and at most the {total:,} tokens of {split}, got {length}")
        self.length = length
        self._count = -(-total // length) if keep_last else total // length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index % len(self) * self.length
        end = min(start + self.length, int(self._ends[-1]))
        place = int(np.searchsorted(self._ends, start, side="right"))
        pieces, articles = [], []
        while start < end:
            article = int(self._order[place])
            first = int(self._ends[place]) - int(self._tokens.sizes[article])
            stop = min(end, int(self._ends[place]))
            pieces.append(self._tokens.read(article, start - first, stop - first))
            articles.append(np.full(stop - start, article))
            start, place = stop, place + 1
        item = {"input_ids": np.concatenate(pieces), "articles": np.concatenate(articles)}
        return {name: torch.from_numpy(values) for name, values in item.items()}


class Articles(Dataset):
    """One article a sequence, of its own length: what one evaluates on.

    Item i is {"input_ids": [t] int64, "articles": [t] int64}, t at most `max_length`.

    Args:
        max_length: longest sequence that the model allows.
        too_long: what becomes of a longer article: an "error", "split" into several sequences, or "cut" off.

    Raises:
        DataError: an article is too long and `too_long` is "error"; unknown split; no separator.
    """

    def __init__(
        self, prepared: Prepared, split: str, max_length: int, *, separator: int | None = None,
        too_long: Literal["error", "split", "cut"] = "error",
    ):
        if too_long not in ("error", "split", "cut"):
            raise DataError(f"too_long must be one of error, split, cut, got {too_long!r}")
        if max_length < 2:
            raise DataError(f"max_length must be at least 2, got {max_length}")
        self._tokens = _Tokens(prepared, split, separator)
        sizes, self.max_length = self._tokens.sizes, max_length
        longest = int(sizes.argmax())
        if too_long == "error" and sizes[longest] > max_length:
            title = prepared.splits[split][longest]["title"]
            raise DataError(f"article {title!r} of {split} has {sizes[longest]:,} tokens, more than max_length "
                            f'{max_length:,}; set too_long to "split" or "cut", or pack')
        pieces = -(-sizes // max_length) if too_long == "split" else np.ones_like(sizes)
        self._ends = np.cumsum(pieces)  # of each article's pieces

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        article = int(np.searchsorted(self._ends, index, side="right"))
        start = (index - (int(self._ends[article - 1]) if article else 0)) * self.max_length
        ids = self._tokens.read(article, start, min(start + self.max_length, int(self._tokens.sizes[article])))
        return {"input_ids": torch.from_numpy(ids), "articles": torch.full((len(ids),), article)}


def boundaries(articles: Tensor) -> Tensor:
    """Where articles begin and end in a sequence: articles [T] -> [n + 1] int32, from 0 to T.

    The cumulative lengths (cu_seqlens) that kernels for packed sequences take.
    """
    starts = torch.nonzero(articles[1:] != articles[:-1]).flatten() + 1  # [n - 1]
    edges = [torch.zeros(1), starts, torch.tensor([len(articles)])]
    return torch.cat([edge.to(articles.device, torch.int32) for edge in edges])


class _Tokens:
    """The ids of a split's articles, each with the separator at its end, read from the memory-mapped file.

    A copy for another process opens the file there; no tokens are sent.
    """

    def __init__(self, prepared: Prepared, split: str, separator: int | None):
        if split not in prepared.manifest["splits"]:
            raise DataError(f"{prepared.manifest['corpus']} has no split {split!r}; "
                            f"there are: {', '.join(prepared.manifest['splits'])}")
        self._separator = prepared.separator if separator is None else separator
        if self._separator is None:
            name = prepared.manifest["tokenizer"]["name"]
            raise DataError(f"the tokenizer {name} has no end of text; give the id of a separator")
        if not 0 <= self._separator < prepared.vocab_size:
            raise DataError(f"separator must be in [0, {prepared.vocab_size:,}), got {self._separator}")
        self._dataset = prepared.splits[split]
        self._open()

    def _open(self) -> None:
        column = self._dataset.data.column("input_ids")
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]  # views of the file
        offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._starts = np.concatenate([o[:-1] for o in offsets])
        self._chunks = np.repeat(np.arange(len(offsets)), [len(o) - 1 for o in offsets])
        self.sizes = np.concatenate([np.diff(o) for o in offsets]).astype(np.int64) + 1  # with the separator

    def __len__(self) -> int:
        return len(self.sizes)

    def __getstate__(self) -> dict:
        return {"_separator": self._separator, "_dataset": self._dataset}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, article: int, start: int, end: int) -> np.ndarray:
        """Tokens start ... end - 1 of an article as int64."""
        first = self._starts[article]
        ids = np.empty(end - start, np.int64)
        text = min(end, int(self.sizes[article]) - 1)  # where its own tokens end
        ids[: text - start] = self._values[self._chunks[article]][first + start : first + text]
        ids[text - start :] = self._separator
        return ids
