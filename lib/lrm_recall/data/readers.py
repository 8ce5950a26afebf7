"""The articles in the files of the offline sources, one reader a file format.

Every reader takes the path of a file and gives articles with unique titles.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lrm_recall.data.articles import Article, clean, first_words
from lrm_recall.data.errors import DataError

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
# The file of essays is one text. Each essay begins with its month, at the start of a line or right behind the full stop
# of the one before it, and goes on with a new line, a parenthesis or a capital.
_ESSAY = re.compile(
    rf"(?:^|(?<=[.!?\")\]\n]))(?={_MONTHS})(?:{_MONTHS}) (?:19|20)\d\d(?:,? \(?rev[^\n]*)?(?= *\n| *\(|[A-Z\"“‘'])"
)
_DOCUMENT = re.compile(r"^BEGIN DOCUMENT (\d+):\n(.*?)\nEND DOCUMENT \1$", re.MULTILINE | re.DOTALL)


def hotpotqa(path: Path) -> Iterator[Article]:
    """The Wikipedia paragraphs that the questions of HotpotQA (dev, distractor) come with, each title once.

    54 titles come with two versions of their paragraph; the first one counts.
    """
    paragraphs: dict[str, list[str]] = {}
    for question in _json(path):
        for title, sentences in question["context"]:
            paragraphs.setdefault(title, sentences)
    for title, sentences in paragraphs.items():
        yield Article(title, clean("".join(sentences).split("\n")))


def hotpotqa_contexts(path: Path) -> Iterator[Article]:
    """The same paragraphs in the groups that they come in: the ten about related things that a question is asked of.

    A group is one sample, as long as an article, where a paragraph of `hotpotqa` has some ninety words. A paragraph
    that an earlier group has is left out, and a group of such alone too; a group is named after its first paragraph.
    """
    seen: set[str] = set()
    for question in _json(path):
        fresh = {title: sentences for title, sentences in question["context"] if title not in seen}
        seen |= fresh.keys()
        if fresh:
            text = "\n".join("".join(sentences) for sentences in fresh.values())
            yield Article(next(iter(fresh)), clean(text.split("\n")))


def squad(path: Path) -> Iterator[Article]:
    """The Wikipedia articles of SQuAD 2.0: all paragraphs of an article are one sample."""
    for article in _json(path)["data"]:
        title = article["title"].replace("_", " ")
        yield Article(title, clean(line for part in article["paragraphs"] for line in part["context"].split("\n")))


def essays(path: Path) -> Iterator[Article]:
    """Paul Graham's essays; each is named after its month and its first words."""
    text = _json(path)["text"]
    starts = [match.start() for match in _ESSAY.finditer(text)]
    pieces = (text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True))
    return _once(Article(first_words(piece), clean(piece.split("\n"))) for piece in pieces)


def long_documents(path: Path) -> Iterator[Article]:
    """The documents (reports, papers, contracts) that the questions of AA-LCR stand on, each once."""
    limit = csv.field_size_limit(2**31 - 1)  # a question's documents are one field of up to 600,000 characters
    try:
        with path.open(encoding="utf-8", newline="") as file:
            contexts = [row["context"] for row in csv.DictReader(file)]
    finally:
        csv.field_size_limit(limit)
    documents = (document for context in contexts for _, document in _DOCUMENT.findall(context))
    distinct = dict.fromkeys(document.strip() for document in documents)
    return _once(Article(first_words(document), clean(document.split("\n"))) for document in distinct)


def jsonl(path: Path) -> Iterator[Article]:
    """A file of one's own: a JSON object a line with `text`, and with `title` unless the first words do.

    Raises:
        DataError: a line that is no such object, or a title that comes twice.
    """
    seen = set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                text, title = row["text"], row.get("title") or first_words(row["text"])
            except (ValueError, TypeError, KeyError, AttributeError):
                raise DataError(f"{path}: line {number} is not a JSON object with a text") from None
            if not isinstance(text, str) or not isinstance(title, str):
                raise DataError(f"{path}: line {number}: text and title must be strings")
            if title in seen:
                raise DataError(f"{path}: line {number}: the title {title!r} comes a second time")
            seen.add(title)
            yield Article(title, clean(text.split("\n")))


READERS: dict[str, Callable[[Path], Iterable[Article]]] = {
    "hotpotqa": hotpotqa,
    "hotpotqa_contexts": hotpotqa_contexts,
    "squad": squad,
    "essays": essays,
    "long_documents": long_documents,
    "jsonl": jsonl,
}


def _json(path: Path):
    return json.loads(path.read_bytes())


def _once(articles: Iterable[Article]) -> Iterator[Article]:
    """The articles with a number behind a title that has come before."""
    count: dict[str, int] = {}
    for title, text in articles:
        count[title] = count.get(title, 0) + 1
        yield Article(title if count[title] == 1 else f"{title} ({count[title]})", text)
