"""The benchmark of preparing a corpus: both ways give the same tokens, the page shows the rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from lrm_recall.data import Corpus
from lrm_recall.data.store import VARIABLE
from lrm_recall.figures.tables import markdown
from lrm_recall.results import ResultStore

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("corpus_bench", ROOT / "bench" / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_ways_give_the_same_tokens(bench, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    file = tmp_path / "articles.jsonl"
    file.write_text("".join(json.dumps({"title": f"T {n}", "text": f"Article {n}: " + "a word, " * n}) + "\n"
                            for n in range(1, 41)))  # fmt: skip
    small = Corpus("small", offline=str(file), validation=0.1, test=0.1)
    results = [bench.ours(small, True), bench.ours(small, False), bench.theirs(small, 1)]
    assert len({result["tokens"] for result in results}) == 1 and results[0]["tokens"] > 40
    assert all(result["seconds"] > 0 and result["peak_mb"] > 0 for result in results)


def test_the_page_shows_the_rows(bench):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    shown = page.partition("<!-- table: corpus -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == markdown(bench.table(ResultStore(ROOT / "outputs/results/bench.laptop.jsonl").rows()))
