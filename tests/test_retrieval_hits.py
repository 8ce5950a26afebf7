"""The benchmark of TF-IDF's finds: questions point where they should, shares are counted, the page shows the rows."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from lrm_recall.data.store import VARIABLE
from lrm_recall.figures.retrieval_hits import retrieval_hits_table
from lrm_recall.figures.tables import markdown
from lrm_recall.results import ResultStore
from lrm_recall.train.lm_data import prepared_corpus, tokenizer_of

ROOT = Path(__file__).resolve().parents[1]
FIRST, LAST = ("Anna", "Bruno", "Clara", "Dario", "Edith"), ("Kovacs", "Lindqvist", "Moreau", "Nakamura", "Okafor")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("retrieval_hits_bench", ROOT / "bench" / "retrieval_hits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Articles of eight sentences, each with a name that no other sentence of it has."""
    folder, chance = tmp_path_factory.mktemp("hits"), random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder / "cache"))
        with (folder / "articles.jsonl").open("w") as file:
            for number in range(12):
                names = chance.sample([f"{first} {last}" for first in FIRST for last in LAST], 8)
                topics = chance.sample(["bridge", "harbour", "orchard", "tower", "market", "library", "mill", "canal",
                                        "chapel", "garden"], 8)  # fmt: skip
                text = " ".join(f"The old {topic} near the river was drawn by {name} in his youth."
                                for topic, name in zip(topics, names, strict=True))  # fmt: skip
                file.write(json.dumps({"title": f"Title {number}", "text": text}) + "\n")
        corpus = {"name": "small", "offline": str(folder / "articles.jsonl"), "validation": 0.1, "test": 0.1}
        yield prepared_corpus(corpus, 300, True)


def test_a_question_ends_before_its_answer_and_the_article_has_the_answer(bench, prepared):
    tokenizer, seen = tokenizer_of(prepared), 0
    for ids, questions in bench.articles(prepared, 3):
        for asked, answered in questions:
            answer = tokenizer.decode(ids[asked + 1 :]).strip().partition("\n")[0]
            assert " ".join(answer.split()[:2]) in [f"{first} {last}" for first in FIRST for last in LAST]
            assert tokenizer.decode(ids[answered:]).strip().startswith(answer)
            assert tokenizer.decode(ids[: asked + 1]).rstrip().endswith("Answer:") and answered < asked
            seen += 1
    assert seen >= 6


def test_shares_are_those_of_questions_that_can_be_answered(bench, prepared):
    found = bench.measure(prepared, 64, 9, window=40)
    assert found["questions"] >= 20 and found["best"] <= found["best_four"] <= 1
    assert found["best_four"] > 2 * found["chance"] > 0  # the best alone is often the question itself
    assert bench.measure(prepared, 64, 9, window=1)["best_four"] < found["best_four"]  # a colon asks for nothing
    assert bench.measure(prepared, 10_000, 3, window=24)["questions"] == 0


def test_the_page_shows_the_rows():
    rows = ResultStore(ROOT / "outputs" / "results" / "bench.laptop.jsonl").rows()
    page = (ROOT / "docs" / "evaluation.md").read_text()
    shown = page.partition("<!-- table: hits -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == markdown(retrieval_hits_table(rows))
