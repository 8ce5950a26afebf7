"""Articles: one sample each, without title lines and empty lines.

Resona, section 4.2.2: all samples of one Wikipedia entry become one, "excessively short title lines or empty lines"
go. WikiText marks both kinds of title itself, ` = Article = ` and ` = = Section = = `; every such line is dropped.
The paper gives no length below which a title is short; WikiText's marks need none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# One mark for an article, two or more for a section. In running text a line with marks at both ends does not occur.
_TITLE = re.compile(r"=(?P<deeper>(?: =)*) (?P<title>.*\S) =(?P=deeper)")


class Article(NamedTuple):
    """One sample; an article without a title of its own is named after its first words."""

    title: str
    text: str


def clean(lines: Iterable[str]) -> str:
    """The lines of one article as its text: stripped, title lines and empty ones left out."""
    stripped = (line.strip() for line in lines)
    return "\n".join(line for line in stripped if line and not _TITLE.fullmatch(line))


def from_wikitext(lines: Iterable[str]) -> Iterator[Article]:
    """The articles of a WikiText split, whose rows are lines.

    An article begins at a title line with one mark that stands between two empty lines: one inside a paragraph,
    such as an equation, is text.
    """
    title, body = "", []
    before, line = "", None
    for after in _padded(lines):
        if line is not None:
            match = _TITLE.fullmatch(line)
            if match and not match["deeper"] and not before and not after:
                if title or any(body):
                    yield _named(title, body)
                title, body = match["title"], []
            else:
                body.append(line)
            before = line
        line = after
    if title or any(body):
        yield _named(title, body)


def from_rows(texts: Iterable[str]) -> Iterator[Article]:
    """The articles of a data set whose rows are articles, named after their first words."""
    for text in texts:
        yield _named("", text.split("\n"))


def _named(title: str, body: list[str]) -> Article:
    text = clean(body)
    return Article(title or first_words(text), text)


def _padded(lines: Iterable[str]) -> Iterator[str]:
    yield from (line.strip() for line in lines)
    yield ""


def first_words(text: str, length: int = 60) -> str:
    """A title for an article that has none: its beginning, on one line."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[:length].rsplit(" ", 1)[0]
