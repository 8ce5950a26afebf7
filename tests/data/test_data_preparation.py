"""Preparation: done once, checked, whole or not at all: two at once, a kill, a full disk."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_files import article_lines, needs, new_cache, small_corpus, write_jsonl

from lrm_recall.data import DataError, Packed, corpus, prepare
from lrm_recall.data.store import VARIABLE, cache_root, sha256

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from lrm_recall.data import DataError, corpus, prepare
{first}
try:
    prepared = prepare(corpus(**json.loads(sys.argv[1])))
except DataError as error:
    sys.exit(f"DataError: {{error}}")
print(prepared.revision)
"""


def start(wanted, first: str = "", **options) -> subprocess.Popen:
    """A process of its own that prepares a corpus and prints its revision; `first` is run before."""
    values = {name: value for name, value in dataclasses.asdict(wanted).items() if value is not None}
    path = os.pathsep.join(str(ROOT / folder) for folder in ("lib", "kernels"))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(first=first), json.dumps(values)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}, **options,
    )


def contents() -> list[str]:
    """What lies in the cache's folder of prepared corpora, locks aside."""
    return sorted(path.name for path in (cache_root() / "prepared").iterdir() if path.suffix != ".lock")


def test_what_a_row_needs_and_what_the_trainer_needs(tmp_path, monkeypatch):
    prepared = prepare(small_corpus(tmp_path, monkeypatch))
    assert prepared.source == "offline:articles.jsonl"
    provenance = prepared.provenance()
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["source_revision"] == sha256(tmp_path / "articles.jsonl")
    assert {name: split["articles"] for name, split in provenance["splits"].items()} == {
        "train": 48, "validation": 6, "test": 6,
    }  # fmt: skip
    for name, split in prepared.splits.items():
        counts = provenance["splits"][name]
        assert counts["tokens"] == sum(map(len, split["input_ids"]))
        assert counts["longest"] == max(map(len, split["input_ids"]))
        assert counts["words"] == sum(split["words"]) == sum(len(text.split()) for text in split["text"])
    assert prepared.splits["train"].cache_files  # memory-mapped


def test_a_second_call_writes_nothing(tmp_path, monkeypatch):
    wanted = small_corpus(tmp_path, monkeypatch)
    first = prepare(wanted)
    monkeypatch.setattr("lrm_recall.data.preparation._make", lambda *_: pytest.fail("made again"))
    assert prepare(wanted).revision == first.revision


def test_another_place_and_another_order_of_calls_give_the_same_revision(tmp_path, monkeypatch):
    revisions = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        wanted = small_corpus(tmp_path / name, monkeypatch, tokenizer=str(tmp_path / "a" / "tokenizer"))
        if name == "a":
            small_corpus(tmp_path / name, monkeypatch)  # writes the tokenizer
        revisions.append(prepare(wanted).revision)
    assert len(set(revisions)) == 1


@pytest.mark.parametrize("change", [
    {"split_seed": 1}, {"max_articles": 30}, {"test": 0.2}, {"rows": article_lines(59)},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_whatever_decides_the_result_is_in_its_name(tmp_path, monkeypatch, change):
    first = prepare(small_corpus(tmp_path, monkeypatch))
    second = prepare(small_corpus(tmp_path, monkeypatch, **change))
    assert (first.path != second.path, first.revision != second.revision) == (True, True)
    assert len(contents()) == 2


@pytest.mark.parametrize("damaged", ["train.arrow", "manifest.json"])
def test_a_damaged_file_is_found_and_made_again_on_request(tmp_path, monkeypatch, damaged):
    wanted = small_corpus(tmp_path, monkeypatch)
    prepared = prepare(wanted)
    file = prepared.path / damaged
    data = bytearray(file.read_bytes())
    data[data.index(b"1")] ^= 1  # one bit
    file.write_bytes(data)
    with pytest.raises(DataError, match="wrong checksum.* --fresh"):
        prepare(wanted)
    assert prepare(wanted, fresh=True).revision == prepared.revision
    assert prepare(wanted).revision == prepared.revision
    assert contents() == [prepared.path.name]


def test_a_missing_file_is_found(tmp_path, monkeypatch):
    wanted = small_corpus(tmp_path, monkeypatch)
    (prepare(wanted).path / "test.arrow").unlink()
    with pytest.raises(DataError, match="test.arrow is missing"):
        prepare(wanted)


def test_an_empty_article(tmp_path, monkeypatch):
    rows = [*article_lines(20), {"title": "Nothing", "text": "\n = T = \n  \n"}]
    with pytest.raises(DataError, match="article 21, 'Nothing', is empty .* drop_empty"):
        prepare(small_corpus(tmp_path, monkeypatch, rows))
    assert contents() == []
    prepared = prepare(small_corpus(tmp_path, monkeypatch, rows, drop_empty=True))
    assert prepared.provenance()["dropped"] == {"empty": 1, "also_held_out": 0}


def test_a_vocabulary_that_does_not_fit(tmp_path, monkeypatch):
    wanted = small_corpus(tmp_path, monkeypatch)
    for _ in range(2):
        with pytest.raises(DataError, match="300 tokens, more than the model's vocab_size 299"):
            prepare(wanted, vocab_size=299)
        assert contents() == []
    prepare(wanted, vocab_size=300)
    with pytest.raises(DataError, match="vocab_size 299"):
        prepare(wanted, vocab_size=299)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """A limit on the size of files stands for the disk: writing fails in the middle of train.arrow."""
    rows = article_lines(400, words=200)
    wanted = small_corpus(tmp_path, monkeypatch, rows)
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    process = start(wanted, limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(errors.strip().splitlines()) == 1
    assert errors.startswith("DataError: cannot write") and "nothing of it was kept. Free some space" in errors
    assert contents() == []
    assert prepare(wanted).splits["train"].num_rows == 320


def test_two_processes_make_it_once(tmp_path, monkeypatch):
    log = tmp_path / "made"
    wanted = small_corpus(tmp_path, monkeypatch, article_lines(2000))
    count = f"""
from lrm_recall.data import preparation
make = preparation._make
def counted(*arguments):
    open({str(log)!r}, "a").write("x")
    make(*arguments)
preparation._make = counted
"""
    processes = [start(wanted, count) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [errors for _, errors in results] == ["", ""]
    assert len({revision for revision, _ in results}) == 1
    assert log.read_text() == "x"


def test_kills_corrupt_nothing(tmp_path, monkeypatch):
    """Processes are killed while they write, at random moments of a preparation made slow."""
    wanted = small_corpus(tmp_path, monkeypatch, article_lines(400))
    writing, chance = tmp_path / "writing", random.Random(0)
    slow = f"""
import pathlib, time
from lrm_recall.data import tokenise
tokenise._BATCH_ARTICLES = 10
batches = tokenise._batches
def slowly(articles):
    for batch in batches(articles):
        pathlib.Path({str(writing)!r}).touch()
        time.sleep(0.05)
        yield batch
tokenise._batches = slowly
"""
    for kill in range(4):
        writing.unlink(missing_ok=True)
        process = start(wanted, slow)
        while not writing.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        _, errors = process.communicate()
        assert (process.returncode, errors) == (-signal.SIGKILL, ""), f"kill {kill}"
        assert all(name.endswith(".partial") for name in contents())
    prepared = prepare(wanted)
    assert contents() == [prepared.path.name]
    assert prepared.revision == prepare(wanted, fresh=True).revision


def test_a_small_real_corpus_from_end_to_end(tmp_path, monkeypatch):
    needs("essays", "gpt2")
    new_cache(tmp_path, monkeypatch)
    begin = time.monotonic()
    prepared = prepare(corpus("essays", source="offline"), vocab_size=50257)
    packed = Packed(prepared, "train", 1024, seed=0)
    seconds = time.monotonic() - begin
    assert {name: split["articles"] for name, split in prepared.provenance()["splits"].items()} == {
        "train": 204, "validation": 4, "test": 4,
    }  # fmt: skip
    assert prepared.provenance()["splits"]["train"]["tokens"] == 669_477
    assert len(packed) == (669_477 + 204) // 1024
    from lrm_recall.data import load_tokenizer

    ids = prepared.splits["test"][0]["input_ids"]
    assert load_tokenizer().decode(ids, clean_up_tokenization_spaces=False) == prepared.splits["test"][0]["text"]
    assert seconds < 20


def test_the_variable_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert cache_root() == tmp_path / "elsewhere"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "lrm-recall"


def test_a_file_that_is_written_to_anew_is_another_corpus(tmp_path, monkeypatch):
    wanted = small_corpus(tmp_path, monkeypatch)
    first = prepare(wanted)
    write_jsonl(tmp_path / "articles.jsonl", article_lines(61))
    assert prepare(wanted).revision != first.revision
