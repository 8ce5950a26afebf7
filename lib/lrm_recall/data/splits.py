"""Splits by article: no article of a validation or test split is in training, not in other words either.

Two articles count as the same when their titles are equal or their first 200 letters and digits are: offline sources
hold one text under several titles, and one essay in two formats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from lrm_recall.data.articles import Article
from lrm_recall.data.errors import DataError

SPLITS = ("train", "validation", "test")
_HEAD = 200  # letters and digits that tell two texts apart


def head(text: str) -> str:
    """What a text is recognised by: its first letters and digits, in lower case."""
    return "".join(character for character in text[: 4 * _HEAD] if character.isalnum())[:_HEAD].casefold()


def check_not_empty(articles: Iterable[Article], drop: bool, dropped: Callable[[], None]) -> Iterator[Article]:
    """The articles that have a text.

    Args:
        drop: whether an empty article is left out and `dropped` called, instead of being an error.

    Raises:
        DataError: an empty article, unless they are dropped.
    """
    for number, article in enumerate(articles, start=1):
        if article.text:
            yield article
        elif drop:
            dropped()
        else:
            raise DataError(f"article {number}, {article.title!r}, is empty once title lines and empty lines are gone; "
                            "set drop_empty: true to leave such articles out")


def split_articles(
    articles: Sequence[Article], *, validation: float, test: float, seed: int, max_articles: int | None
) -> dict[str, list[Article]]:
    """Divide the articles of a source that has no splits of its own.

    Articles are ordered by a hash of (seed, title), so that neither their order in the source nor Python's decides.
    The first `max_articles` of that order are kept; the first of those are the test split, then comes validation.
    Within a split articles keep the order of the source.

    Args:
        validation, test: shares of the articles, 0 for none; a share above 0 gets at least one article.

    Raises:
        DataError: fewer articles than splits, or nothing is left for training.
    """
    titles: dict[str, str] = {}  # head -> title of the first article with it: the same text goes to the same split
    owner = [titles.setdefault(head(article.text), article.title) for article in articles]
    rank = {title: hashlib.sha256(f"{seed}\0{title}".encode()).digest() for title in set(owner)}
    order = sorted(range(len(articles)), key=lambda i: (rank[owner[i]], i))[:max_articles]
    cuts = {"test": _share(test, len(order)), "validation": _share(validation, len(order))}
    split_of, place = {}, 0
    for name, size in cuts.items():
        end = place + size
        while size and end < len(order) and owner[order[end]] == owner[order[end - 1]]:
            end += 1  # never between two articles of one text
        split_of |= dict.fromkeys(order[place:end], name)
        place = end
    split_of |= dict.fromkeys(order[place:], "train")
    if place >= len(order):
        raise DataError(f"{len(order)} articles are too few: validation {validation} and test {test} leave none "
                        "for train")
    splits: dict[str, list[Article]] = {name: [] for name in SPLITS if name == "train" or cuts[name]}
    for index in sorted(split_of):
        splits[split_of[index]].append(articles[index])
    return splits


def without(articles: Iterable[Article], held_out: set[str], dropped: Callable[[], None]) -> Iterator[Article]:
    """The articles that are not among `held_out` (see `fingerprints`); `dropped` is called for every other."""
    for article in articles:
        if held_out.isdisjoint(fingerprints(article)):
            yield article
        else:
            dropped()


def fingerprints(article: Article) -> tuple[str, str]:
    """What an article is recognised by in another split: its title and its head."""
    return f"title {article.title}", f"head {head(article.text)}"


def _share(share: float, count: int) -> int:
    return max(1, round(share * count)) if share else 0
