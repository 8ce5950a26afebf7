"""An augmentation without a model: sentences of the article, asked again behind it with a name or number left out.

    Fill in: The film was directed by ___ and released in 1994.
    Answer: Tim Burton

What is left out stands in the article once, and nowhere else; so neither the words around it nor how often it occurs
help to write it, and whoever has forgotten the sentence must look it up. The order of the questions is not that of the
article.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from lrm_recall.data.articles import Article

BLANK, QUESTION, ANSWER = "___", "Fill in: ", "Answer: "
_WORDS = range(6, 41)  # of a sentence worth asking
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”')\]]*\s+(?=[\"“'(\[]?[A-Z0-9])")
_WHOLE = re.compile(r"[\"“'(\[]?[A-Z0-9].*[.!?][\"”')\]]*")
_WRAPPED = re.compile(r"(?<![.!?:])\n(?=[a-z(])")  # a line that goes on in the next
# A name: capitalised words, with small ones between them; or a number.
_NAME = r"[A-Z][\w'’-]*\w"
_GAP = re.compile(rf"(?<![\w.])(?:{_NAME}(?: (?:(?:of|the|de|van|von) )?{_NAME})*|\d[\d,.]*\d)(?!\w)")


class Cloze(NamedTuple):
    """A sentence with a gap, and what belongs there."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Recap:
    """Questions behind each article.

    Attributes:
        questions: the most of an article.
        share: the most letters that are added, as a share of those of the article.
        seed: which sentences are asked, and their order.

    Raises:
        ValueError: no question, or a share that is not in (0, 1].
    """

    kind: ClassVar[str] = "recap"
    questions: int = 4
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ValueError(f"recap: questions must be at least 1, got {self.questions}")
        if not 0 < self.share <= 1:
            raise ValueError(f"recap: share must be above 0 and at most 1, got {self.share}")

    def identity(self) -> dict[str, Any]:
        """All that decides the additions."""
        return {"kind": self.kind, **asdict(self)}

    def extend(self, articles: Sequence[Article]) -> list[str]:
        """The recap of each article; empty where it has no sentence to ask, or is too short for one."""
        return [self._recap(article) for article in articles]

    def _recap(self, article: Article) -> str:
        candidates = sentences(article.text)
        digest = hashlib.sha256(f"{self.seed}\0{article.title}".encode()).digest()
        random.Random(digest).shuffle(candidates)
        room, blocks = int(self.share * len(article.text)), []
        for sentence in candidates:
            if len(blocks) == self.questions:
                break
            cloze = make_cloze(sentence, article.text)
            block = cloze and f"{QUESTION}{cloze.question}\n{ANSWER}{cloze.answer}"
            if block and len(block) < room:
                blocks.append(block)
                room -= len(block) + 1
        return "\n".join(blocks)


def sentences(text: str) -> list[str]:
    """The whole sentences of a text, each on one line, that are neither short nor long."""
    lines = _WRAPPED.sub(" ", text).split("\n")
    found = (sentence.strip() for line in lines for sentence in _SENTENCE_END.split(line))
    return [sentence for sentence in found if _WHOLE.fullmatch(sentence) and len(sentence.split()) in _WORDS]


def make_cloze(sentence: str, text: str) -> Cloze | None:
    """A sentence of a text with a gap for its longest name or number that stands in the text once; None without one.

    At the beginning of a sentence a word alone is no name, nor are several where the text has the first in small
    letters too.
    """
    if BLANK in sentence:
        return None
    for gap in sorted(_GAP.finditer(sentence), key=lambda gap: (-len(gap[0]), gap.start())):
        first, _, rest = gap[0].partition(" ")
        is_name = gap.start() > 1 or (rest and not re.search(rf"\b{re.escape(first.lower())}\b", text))
        if is_name and text.count(gap[0]) == 1:
            return Cloze(sentence[: gap.start()] + BLANK + sentence[gap.end() :], gap[0])
    return None
