"""The store of results: keys, atomic appends, torn and foreign lines, concurrent writers, tables."""

from __future__ import annotations

import json
import multiprocessing
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrm_recall.results import ResultStore, StoreError, frame, load_profiles, merge_rows, profile_path
from lrm_recall.rows import make_row, run_key

DATA = {"source": "generated", "revision": "1"}


def row(seed: int = 0, error: str | None = None, accuracy: float = 0.5, **config):
    return make_row(
        experiment="mqar",
        config={"mixer": "gla", "seed": seed, **config},
        seed=seed,
        data=DATA,
        code="c0de",
        profile="smoke",
        machine={"cpu": "abacus"},
        metrics={} if error else {"accuracy": accuracy},
        error=error,
    )


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(tmp_path / "results" / "synthetic.smoke.jsonl")


# --- keys

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_key_survives_json_and_the_order_of_fields(config):
    key = run_key("mqar", config, 0, "1", "c0de")
    backwards = dict(reversed(json.loads(json.dumps(config)).items()))
    assert run_key("mqar", backwards, 0, "1", "c0de") == key
    assert len(key) == 16 and int(key, 16) >= 0


def test_key_is_the_same_for_equal_values_and_for_ever():
    assert run_key("mqar", {"lr": 1e-3, "n": 2.0, "layers": (0, 1)}, 0, "1", "c") == "b8dcb5c48b043376"
    assert run_key("mqar", {"layers": [0, 1], "n": 2, "lr": 0.001}, 0, "1", "c") == "b8dcb5c48b043376"


@pytest.mark.parametrize(
    "other",
    [("mad", {"n": 1}, 0, "1", "c"), ("mqar", {"n": 2}, 0, "1", "c"), ("mqar", {"n": 1}, 1, "1", "c"),
     ("mqar", {"n": 1}, 0, "2", "c"), ("mqar", {"n": 1}, 0, "1", "d"), ("mqar", {"n": True}, 0, "1", "c"),
     ("mqar", {"n": "1"}, 0, "1", "c"), ("mqar", {"n": 1, "m": None}, 0, "1", "c")],
)  # fmt: skip
def test_key_tells_runs_apart(other):
    assert run_key(*other) != run_key("mqar", {"n": 1}, 0, "1", "c")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), {"a": {3}}])
def test_key_refuses_what_json_cannot_hold(value):
    with pytest.raises(ValueError):
        run_key("mqar", {"x": value}, 0, "1", "c")


# --- storing and reading back


def test_rows_come_back_as_they_went_in(store):
    first, second = row(0), row(1)
    store.append(first)
    store.append(second)
    assert store.rows() == [first, second] == ResultStore(store.path).rows()
    assert store.get(first["key"]) == first
    assert store.get("0" * 16) is None
    assert store.missing([second["key"], "f" * 16, first["key"], "f" * 16]) == ["f" * 16]
    assert store.path.read_bytes().count(b"\n") == 2


def test_an_empty_store_has_nothing(store):
    assert store.rows() == store.failures() == []
    assert store.missing(["a", "b"]) == ["a", "b"]
    store.repair()
    assert not store.path.parent.exists()


def test_last_row_of_a_key_wins(store):
    for accuracy in (0.1, 0.2):
        store.append(row(accuracy=accuracy))
    assert [r["metrics"]["accuracy"] for r in store.rows()] == [0.2]


def test_failed_rows_are_not_stored_results(store):
    failed = row(error="RuntimeError: no")
    store.append(failed)
    assert store.rows() == [] and store.get(failed["key"]) is None
    assert store.missing([failed["key"]]) == [failed["key"]]
    assert store.failures() == [failed]
    store.append(row())
    store.append(failed)  # such as a slower twin of the run, that ran out of memory
    assert store.failures() == [] and store.missing([failed["key"]]) == []


def test_a_store_sees_what_others_append(store):
    store.append(row(0))
    ResultStore(store.path).append(row(1))
    assert len(store.rows()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "0" * 16}, "its content has the key"),
        ({"key": "short"}, "not 16 hex digits"),
        ({"status": "done"}, "not one of ok, failed"),
        ({"status": "failed"}, "error is None"),
        ({"seed": "0"}, "seed is '0', not int"),
        ({"seed": True}, "seed is True, not int"),
        ({"metrics": {"loss": float("nan")}}, "metrics.loss is not a finite number"),
        ({"history": [{"loss": 1.0}, {"loss": float("inf")}]}, r"history\[1\].loss is not a finite number"),
        ({"metrics": {"loss": object()}}, "metrics.loss holds"),
        ({"data": {"source": "x"}}, "data lacks revision"),
        ({"note": "hello"}, "unknown fields: note"),
    ],
)
def test_an_invalid_row_is_refused_and_nothing_written(store, change, message):
    store.append(row())
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match=message):
        store.append(row(1) | change)
    assert store.path.read_bytes() == before


def test_make_row_refuses_a_row_that_the_store_would(tmp_path):
    with pytest.raises(ValueError, match="data lacks revision"):
        make_row(experiment="x", config={}, seed=0, data={"source": ""}, code="", profile="", machine={})


# --- torn and foreign lines


@given(cut=st.floats(0, 1, exclude_max=True))
@pytest.mark.filterwarnings("ignore:.*cut off in the middle")
def test_a_line_torn_anywhere_is_moved_away(tmp_path_factory, cut):
    store = ResultStore(tmp_path_factory.mktemp("torn") / "x.smoke.jsonl")
    store.append(row(0))
    whole = store.path.read_bytes()
    store.append(row(1, note="ünïcödé"))
    line = store.path.read_bytes()[len(whole) :]
    torn = line[: int(cut * len(line))]
    store.path.write_bytes(whole + torn)
    complete = len(torn) == len(line) - 1  # only the newline is missing: the row is there
    for reader in (store, ResultStore(store.path)):
        assert [r["seed"] for r in reader.rows()] == ([0, 1] if complete else [0])
    store.append(row(2))
    assert [r["seed"] for r in store.rows()] == ([0, 1, 2] if complete else [0, 2])
    assert store.path.read_bytes().startswith(whole)
    aside = store.path.with_name("x.smoke.jsonl.torn")
    moved = torn + b"\n" if torn and not complete else b""
    assert (aside.read_bytes() if aside.exists() else b"") == moved


def test_repair_warns_once_and_clearly(store):
    store.append(row())
    with store.path.open("ab") as file:
        file.write(b'{"key":"0123')
    assert len(store.rows()) == 1  # reading neither repairs nor complains
    told = r"smoke.jsonl: the last line was cut off.*12 bytes"
    with pytest.warns(UserWarning, match=told) as caught:
        store.repair()
        store.repair()
    assert len(caught) == 1
    assert store.path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"key":"0123456789abcdef","exper', "line 2 is not JSON"),
        (b"<<<<<<< HEAD", "line 2 is not JSON: '<<<<<<< HEAD'"),
        (b"", "line 2 is not JSON: ''"),
        (b"[1, 2]", "line 2 is not a row of results: it is a JSON list"),
        (b'{"hello": "world"}', "line 2 is not a row of results: it lacks key, experiment"),
        (b"\xff\xfe\x00", "line 2 is not JSON"),
        (b"\x00" * 20, "line 2 is not JSON"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_foreign_line_is_one_error_and_nothing_is_written(store, line, message, last):
    store.append(row(0))
    content = store.path.read_bytes()
    store.append(row(1))
    content += line + b"\n" + (b"" if last else store.path.read_bytes()[len(content) :])
    store.path.write_bytes(content)
    for attempt in (store.rows, store.repair, lambda: store.append(row(2)), ResultStore(store.path).rows):
        with pytest.raises(StoreError, match=f"synthetic.smoke.jsonl: {message}"):
            attempt()
    assert store.path.read_bytes() == content


def test_a_file_of_another_kind_is_left_alone(store):
    store.path.parent.mkdir()
    store.path.write_bytes(b"# Notes without a last newline")
    with pytest.raises(StoreError, match="line 1 is not JSON"):
        store.append(row())
    assert store.path.read_bytes() == b"# Notes without a last newline"


def test_a_full_disk_leaves_no_half_row(store, monkeypatch):
    store.append(row(0))
    before = store.path.read_bytes()
    write = __import__("os").write
    monkeypatch.setattr("lrm_recall.results.os.write", lambda file, data: write(file, data[:40]))
    with pytest.raises(OSError, match="only 40 of"):
        store.append(row(1))
    assert store.path.read_bytes() == before


# --- many writers


def _append_many(path, first: int) -> None:
    for seed in range(first, first + 10):
        ResultStore(path).append(row(seed, filler="x" * 20_000))


def test_threads_and_processes_write_at_once(store):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(store.path, 100 * n)) for n in range(1, 3)]
    writers += [threading.Thread(target=_append_many, args=(store.path, 100 * n)) for n in range(3, 6)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        store.rows()  # a reader never meets half a line
    expected = {seed for n in range(1, 6) for seed in range(100 * n, 100 * n + 10)}
    assert {r["seed"] for r in store.rows()} == expected
    assert store.path.read_bytes().count(b"\n") == len(expected)


# --- tables


def test_frame_flattens_configuration_and_metrics(store):
    store.append(row(0, resona={"layers": [0, 2], "top_k": 1}))
    store.append(row(1, error="no"))
    table = store.frame()
    assert len(table) == 1
    columns = ["config.mixer", "config.resona.layers", "config.resona.top_k"]
    assert table.loc[0, columns].tolist() == ["gla", (0, 2), 1]
    assert table.loc[0, "metrics.accuracy"] == 0.5 and table.loc[0, "machine.cpu"] == "abacus"
    assert len(frame(store.rows() + store.failures())) == 2


def test_profiles_are_loaded_side_by_side(tmp_path):
    for profile, accuracy in (("smoke", 0.1), ("laptop", 0.9)):
        ResultStore(profile_path(tmp_path, "synthetic", profile)).append(row(accuracy=accuracy))
    ResultStore(profile_path(tmp_path, "efficiency", "laptop")).append(row(7))
    table = load_profiles(tmp_path, "synthetic")
    assert table[["profile", "metrics.accuracy"]].to_numpy().tolist() == [["laptop", 0.9], ["smoke", 0.1]]
    assert list(load_profiles(tmp_path, "nothing").columns) == ["profile"]


def test_a_result_of_older_code_gives_way(tmp_path):
    store = ResultStore(profile_path(tmp_path, "synthetic", "smoke"))
    common = {"experiment": "mqar", "config": {}, "data": DATA, "profile": "smoke", "machine": {}}
    for code, seed in (("old", 0), ("old", 1), ("new", 0)):
        store.append(make_row(**common, seed=seed, code=code, metrics={"accuracy": 1.0}))
    table = load_profiles(tmp_path, "synthetic")
    assert sorted(zip(table["seed"], table["code"], strict=True)) == [(0, "new"), (1, "old")]
    assert len(store.frame()) == 3


def test_rows_of_several_files_merge_by_key():
    old, new, failed = row(accuracy=0.1), row(accuracy=0.2), row(error="no")
    other = row(1)
    assert merge_rows([old, other], [new], [failed]) == [other, new]
    assert merge_rows([failed], [old]) == [old]
