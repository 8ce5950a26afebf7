"""Rows that outlive a change of their code: what is done again, what is written, and that what is committed holds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from lm_small import WITH_RESONA, prepare_small, small_cache, small_run

from lrm_recall import code_hash as codes
from lrm_recall.code_hash import code_hash, same_code, source_hash
from lrm_recall.data.store import cache_root
from lrm_recall.results import ResultStore
from lrm_recall.rows import make_row
from lrm_recall.same_code import differences, show_same, stale, witnesses
from lrm_recall.train.language_model import EXPERIMENT, LMRun, code_modules, row_key, run_lm
from lrm_recall.train.lm_checkpoints import model_folder
from lrm_recall.workbook import main

RESULTS = Path(__file__).resolve().parents[1] / "outputs" / "results"
OLD = "0123456789abcdef"


def row_of(run: LMRun, result: dict, code: str = OLD, **fields) -> dict:
    values = {"metrics": result["metrics"], "history": result["history"], "runtime_s": result["runtime_s"]} | fields
    return make_row(experiment=EXPERIMENT, config=asdict(run), seed=run.seed, code=code, profile="smoke", machine={},
                    data={"source": "made up", "revision": "1"}, **values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        corpus = small_cache(tmp_path_factory.mktemp("lm"), patch)
        run = small_run(corpus, **WITH_RESONA)
        yield run, run_lm(run)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A file of names that is empty at first."""
    path = tmp_path / "same_code.json"
    monkeypatch.setattr(codes, "SAME_CODE", path)
    same_code.cache_clear()
    yield path
    same_code.cache_clear()


def test_a_row_that_comes_out_equal_gives_its_code_to_all(trained, names):
    run, result = trained
    row = row_of(run, result)
    assert stale([row]) == [row]
    said = []
    assert show_same([row], said.append)
    assert said == [f"{row['key']} gla resona: equal"]
    new = source_hash(code_modules(run))
    assert json.loads(names.read_text()) == {new: {"as": OLD, "rows": [row["key"]]}}
    assert code_hash(code_modules(run)) == OLD and not stale([row])
    assert show_same([row], said.append) and len(said) == 1  # nothing is stale: nothing is done


def test_one_digit_off_and_nothing_is_written(trained, names):
    run, result = trained
    loss = result["metrics"]["test_loss"] * (1 + 1e-15)
    row = row_of(run, result | {"metrics": result["metrics"] | {"test_loss": loss}})
    said = []
    assert not show_same([row], said.append)
    assert f"metrics.test_loss: {loss!r} in the row" in said[0]
    assert not names.exists() and stale([row])


def test_of_two_old_codes_the_one_with_more_rows_gives_its_name(trained, names):
    run, result = trained
    other = row_of(run, result, code=OLD[::-1])
    rows = [row_of(run, result), row_of(replace(run, seed=1), result, runtime_s=1e9), other]
    assert not show_same(rows, lambda text: None, workers=1)
    assert [entry["as"] for entry in same_code().values()] == [OLD] and stale(rows) == [other]


def test_a_run_that_fails_is_a_difference_and_names_that_nothing_needs_go(trained, names):
    run, result = trained
    bad = replace(run, corpus={**run.corpus, "offline": "nowhere.jsonl"})
    names.write_text(json.dumps({"f" * 16: {"as": OLD, "rows": ["1" * 16]}, "e" * 16: {"as": "d" * 16, "rows": []}}))
    same_code.cache_clear()
    said = []
    assert not show_same([row_of(bad, result)], said.append, workers=1)
    assert "DataError" in said[0] and set(same_code()) == {"e" * 16}  # of another file's rows


def test_what_the_user_has_trained_stays(trained, names):
    run, _ = trained
    result = run_lm(run)  # anew: its key is of the names in this test
    key = row_key(run, prepare_small(run.corpus))
    assert model_folder(key).is_dir()
    assert show_same([row_of(run, result)], lambda text: None)
    assert model_folder(key).is_dir() and not list(cache_root().glob("same-code-*"))


def test_times_may_differ_and_nothing_else(trained):
    run, result = trained
    row = row_of(run, result)
    slower = {**result["metrics"], "tokens_per_s": 1.0}
    history = [{**entry, "seconds": 9.0} for entry in result["history"]]
    assert differences(row, slower, history) == []
    assert differences(row, slower, history[:-1]) == ["history"]
    assert differences(row, {**slower, "more": 1}, history) == ["metrics.more: None in the row, 1 now"]


def test_witnesses_are_the_cheapest_of_every_kind(trained):
    run, result = trained
    base = small_run(run.corpus)
    rows = [row_of(run, result, runtime_s=3.0), row_of(run, result, runtime_s=2.0), row_of(base, result, runtime_s=1.0),
            row_of(run, result, code=OLD[::-1], runtime_s=9.0), row_of(small_run(run.corpus, packed=True), result)]
    assert witnesses(rows) == sorted([rows[3], rows[1], rows[2], rows[4]], key=lambda row: -row["runtime_s"])


def test_what_is_committed_holds():
    """Every name is one that rows need now, and the rows that show it are stored."""
    rows = [row for path in RESULTS.glob("language_model.*.jsonl") for row in ResultStore(path).rows()]
    by_key = {row["key"]: row for row in rows}
    current = {source_hash(code_modules(LMRun(**row["config"]))) for row in rows}
    for name, entry in same_code().items():
        assert name in current, f"{name} is no code of today: run `lrm-recall results same-code` again"
        assert entry["rows"] and all(by_key[key]["code"] == entry["as"] for key in entry["rows"])


def test_the_command_refuses_what_it_cannot_do_again(capsys):
    assert main(["results", "same-code", "nothing.jsonl"]) == 2
    assert "there is no file nothing.jsonl" in capsys.readouterr().err
    assert main(["results", "same-code", str(RESULTS / "synthetic.laptop.jsonl")]) == 2
    assert "only language_model can be done again" in capsys.readouterr().err
    assert main(["results", "same-code", str(RESULTS / "language_model.wikipedia.jsonl")]) == 2
    assert "has rows of NVIDIA H200; runs are done again on a CPU" in capsys.readouterr().err
