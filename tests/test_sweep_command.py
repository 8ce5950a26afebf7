"""`lrm-recall sweep` and `results merge`: the notebook's runs, mistakes in one line, stores that stay whole."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from notebook_scope import WORKBOOK, scope_of
from sweep_runs import QuickRun

from lrm_recall import results, sweep_command
from lrm_recall.figures.mqar_base_controls import CONTROLS
from lrm_recall.results import ResultStore
from lrm_recall.rows import make_row
from lrm_recall.sweep_choice import chosen, condition, shard
from lrm_recall.train.synthetic_runs import EMBEDDING, EXAMPLES, by_experiment, synthetic_experiments, synthetic_runs
from lrm_recall.train.trials import cell_of
from lrm_recall.workbook import Workbook, main

ROOT = Path(__file__).resolve().parents[1]
NAME = "01_synthetic"
TINY = ["num_train=64", "num_test=32", "max_epochs=1", "lengths=[[16, 2, 16]]", "d_models=[16]", "workers=1",
        "ablated_gates=[null_chunk]"]  # fmt: skip
ASKED = 6  # TINY's runs: base and resona0 of two mixers, and the two controls
MAD = 4  # base and Resona on two tasks


@cache
def runs_of(profile: str) -> dict[str, list]:
    return by_experiment(synthetic_runs(Workbook(ROOT).parameters(NAME, profile, {})))


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Call the command on the repository with TINY's parameters; exit code, standard output, lines of ours in error."""
    monkeypatch.chdir(ROOT)

    def call(*words: str) -> tuple[int, str, list[str]]:
        given = [word for each in TINY for word in ("-p", each)]
        code = main(["sweep", "synthetic", "--results", str(tmp_path), *given, *words])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("lrm-recall: ")]

    return call


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(tmp_path / "synthetic.smoke.jsonl")


# --- the same runs as the notebook


@pytest.mark.parametrize("profile", ["smoke", "laptop"])
def test_the_command_asks_for_the_runs_of_the_notebook(profile):
    scope = scope_of(NAME, profile, "control")
    mine = synthetic_runs(WORKBOOK.parameters(NAME, profile, {}))
    for name in ("main", "ablation", "control", "narrow", "examples"):
        assert getattr(mine, name) == scope[name], name
    assert {EMBEDDING, EXAMPLES} == set(CONTROLS), "the tables look for the rows under these names"


def test_a_sweep_leaves_rows_and_the_next_one_does_nothing(sweep, store):
    code, out, lines = sweep("--only", "experiment=mqar")
    assert (code, lines) == (0, []) and out == f"{store.path}: {ASKED} rows of these runs\n"
    rows = store.rows()
    assert len(rows) == ASKED and {row["profile"] for row in rows} == {"smoke"}
    assert {row["experiment"] for row in rows} == {"mqar"}
    assert sweep("--only", "experiment=mqar")[0] == 0 and store.rows() == rows
    assert sweep("--only", "experiment=mqar-embedding")[0] == 0 and len(store.rows()) == ASKED + 1


def test_a_dry_run_lists_runs_and_costs_and_does_nothing(sweep, store):
    code, out, _ = sweep("--dry-run")
    assert code == 0 and not store.path.parent.joinpath(store.path.name).exists()
    assert out.startswith(f"mqar: {ASKED} runs, 0 stored, {ASKED} to do, about 0 s of work\n")
    assert out.count("  to do   ") == ASKED + 1 + MAD and "variant='resona0'" in out  # one: the control of embeddings
    sweep("--only", "mixer=gla", "--only", "variant=base")
    out = sweep("--dry-run")[1]
    assert f"{ASKED} runs, 1 stored, {ASKED - 1} to do" in out and "  judged by 1 stored runs, " in out


def test_a_dry_run_knows_what_is_solved(sweep, store):
    words = ["--only", "variant=base", "--only", "mixer=baseconv"]
    assert sweep(*words)[0] == 0
    (row,) = store.rows()
    two = [*words, "-p", "learning_rates=[1.0e-2, 3.0e-3]", "--dry-run"]
    assert sweep(*two)[1].startswith("mqar: 2 runs, 1 stored, 1 to do")
    store.append(row | {"metrics": row["metrics"] | {"valid_accuracy": 1.0}})
    assert sweep(*two)[1] == "mqar: 1 runs, 1 stored, 0 to do\n"


def test_no_run_is_started_when_the_time_is_up(sweep, store, monkeypatch):
    monkeypatch.setattr(sweep_command.time, "monotonic", itertools.count(0.0, 10.0).__next__)
    code, out, _ = sweep("--budget", "1", "--only", "variant=base", "--only", "experiment=mqar")
    assert code == 0 and out == f"{store.path}: 0 rows of these runs, 2 not started for want of time\n"


def test_failed_runs_are_told_and_tried_again_on_request(sweep, store):
    diverges = ["--only", "mixer=gla", "--only", "variant=base", "--only", "experiment=mqar",
                "-p", "learning_rates=[1.0e+30]"]  # fmt: skip
    for again in ([], ["--retry-failed"]):
        code, out, lines = sweep(*diverges, *again)
        assert code == 1 and out == f"{store.path}: 0 rows of these runs, 1 failed\n"
        (line,) = lines
        assert line.startswith("lrm-recall: 1 failed: DivergedError: training diverged in epoch 1 of 1")
    assert len(store.path.read_text().splitlines()) == 2
    assert sweep(*diverges)[0] == 1 and len(store.path.read_text().splitlines()) == 2


# --- mistakes: exit code 2, one line, nothing done


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--profile", "papr"], "unknown profile 'papr' (did you mean 'paper'?)"),
        (["-p", "mixrs=[gla]"], f"{NAME}: -p: unknown parameter 'mixrs' (did you mean 'mixers'?)"),
        (["-p", "mixers=[mamba3]"], "unknown mixer 'mamba3'"),
        (["--only", "mixr=gla"], "--only mixr: no run has such a field (did you mean 'mixer'?); there are: batch_size"),
        (["--only", "mixer=mamba"], "--only mixer=mamba: no run fits"),
        (["--only", "mixer"], "--only mixer: must be KEY=VALUE"),
        (["-p", "lengths=[[64, 4]]"], "a line of lengths must be [input length, key-value pairs, batch size], got"),
        (["-p", "top_k=9"], "top_k must be at most 8, the chunks of 2 in an input of 16, got 9"),
        (["-p", "top_k=2", "-p", "chunk_size=32"], "top_k must be at most 1, the chunks of 32 in an input"),
        (["-p", "control_examples=[[5]]"], "a line of control_examples must be [examples, epochs], got [5]"),
        (["-p", "budget=-1"], "budget must be at least 0, got -1"),
        (["-p", "workers=0"], "workers must be at least 1, got 0"),
        (["--results", __file__], f"--results {__file__}: {__file__} is a file, not a folder"),
        (["--results", f"{__file__}/rows", "--dry-run"], f"--results {__file__}/rows: {__file__} is a file"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available here; allowed: cpu"),
    ],
)
def test_a_mistake_is_one_line(sweep, store, words, message):
    code, out, (line,) = sweep(*words)
    assert code == 2 and out == "" and line.startswith(f"lrm-recall: {message}")
    assert not store.path.exists()


@pytest.mark.parametrize("words", ["--workers 0", "--workers many", "--shard 3", "--shard 0/2", "--shard 3/2",
                                   "--budget 0", "--bugdet 3"])  # fmt: skip
def test_words_that_mean_nothing_exit_with_2(sweep, words):
    with pytest.raises(SystemExit, match="2"):
        sweep(*words.split())


def test_an_unknown_sweep_is_one_line(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["sweep", "syntetic"]) == 2
    assert capsys.readouterr().err == ("lrm-recall: there is no sweep 'syntetic' (did you mean 'synthetic'?); there "
                                       "are: synthetic\n")  # fmt: skip


def test_a_corrupt_store_is_one_line(sweep, store):
    store.path.write_text("not json\n")
    code, _, (line,) = sweep()
    assert code == 2 and line == f"lrm-recall: {store.path}: line 1 is not JSON: 'not json'"


def test_a_full_disk_is_one_line(sweep, store, monkeypatch):
    real = os.write
    monkeypatch.setattr(results.os, "write", lambda file, data: real(file, data[: len(data) // 2]))
    code, _, (line,) = sweep("--only", "variant=base")
    assert code == 1 and "bytes fit on the disk" in line and line.endswith("; the rows stored so far are kept")
    assert store.path.read_bytes() == b""
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert sweep("--only", "variant=base", "--only", "experiment=mqar")[0] == 0 and len(store.rows()) == 2


def test_a_terminated_sweep_leaves_whole_rows_and_no_claims(store):
    tiny = [word for each in [*TINY, "num_train=2000"] for word in ("-p", each)]
    words = ["sweep", "synthetic", "--results", store.path.parent, *tiny]
    process = subprocess.Popen(
        [sys.executable, "-m", "lrm_recall.workbook", *words], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 60
    while not store.rows() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and told.endswith("lrm-recall: interrupted; the rows stored so far are kept\n")
    assert store.path.read_bytes().endswith(b"}\n") and 1 <= len(store.rows()) < ASKED
    assert store.failures() == [] and os.listdir(store.path.parent) == [store.path.name]


# --- which runs


def test_conditions_choose_by_value_list_and_path():
    runs = runs_of("laptop")
    only = [condition(word) for word in ("mixer=[gla, mamba2]", "d_model=64", "variant=resona2", "experiment=mqar")]
    found = chosen(runs, only)["mqar"]
    assert found and {run.mixer for run in found} == {"gla", "mamba2"}
    assert {(run.d_model, run.variant) for run in found} == {(64, "resona2")}
    assert chosen(runs, [condition("resona.alpha=1.0")]).keys() == {"mqar"}
    assert chosen(runs, []) == {name: those for name, those in runs.items() if those}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shards_are_disjoint_and_whole_and_keep_groups_together(count):
    runs, experiments = runs_of("laptop"), synthetic_experiments("cpu")
    parts = [shard(runs, experiments, index, count) for index in range(count)]
    for name, those in runs.items():
        got = [run for part in parts for run in part[name]]
        assert sorted(map(repr, got)) == sorted(map(repr, those))
        groups = [{cell_of(asdict(run)) for run in part[name]} for part in parts]
        assert sum(map(len, groups)) == len(set().union(*groups))
    costs = [sum(experiments[name].cost(run) for name, those in part.items() for run in those) for part in parts]
    assert max(costs) < 1.3 * min(costs)


# --- merging


def _row(seed: int, second: int, ok: bool) -> dict:
    row = make_row(experiment="quick", config=vars(QuickRun(seed)), seed=seed, data={"source": "", "revision": ""},
                   code="", profile="paper", machine={}, error=None if ok else "RuntimeError: no",
                   metrics={"accuracy": float(second)})  # fmt: skip
    return row | {"created": f"2026-01-01T00:00:{second:02}.000+00:00"}


_ROWS = st.lists(st.builds(_row, st.integers(0, 3), st.integers(0, 59), st.booleans()), max_size=12,
                 unique_by=lambda row: (row["key"], row["created"]))  # fmt: skip


@given(rows=_ROWS, cuts=st.lists(st.integers(0, 3), min_size=12, max_size=12), order=st.randoms(use_true_random=False))
def test_merging_keeps_the_newest_good_row_of_each_key_wherever_rows_were(tmp_path_factory, rows, cuts, order):
    folder = tmp_path_factory.mktemp("merge")
    stores = [ResultStore(folder / f"{index}.jsonl") for index in range(4)]
    for row, cut in zip(rows, cuts, strict=False):
        stores[cut].append(row)
    into = stores[0]
    others = stores[1:]
    order.shuffle(others)
    for other in others:
        before = len(into.path.read_text()) if into.path.exists() else 0
        told = into.merge([*other.failures(), *other.rows()])
        assert (len(into.path.read_text()) > before) == (told.added + told.replaced > 0)
        again = into.merge([*other.failures(), *other.rows()])
        assert again.added == again.replaced == 0, "merging twice must change nothing"
    for key in {row["key"] for row in rows}:
        mine = [row for row in rows if row["key"] == key]
        good = [row for row in mine if row["status"] == "ok"]
        # a store counts its last good row, so among rows of one store it is the order that decides
        got = {row["key"]: row for row in (*into.failures(), *into.rows())}[key]
        assert got in mine and (got["status"] == "ok") == bool(good)
        if len({cut for row, cut in zip(rows, cuts, strict=False) if row["key"] == key}) == len(mine):
            assert got == max(good or mine, key=lambda row: row["created"])


@pytest.fixture
def places(tmp_path, monkeypatch) -> tuple[Path, list[Path]]:
    """A workbook to merge into, and rows of two machines: an old and a new one, and one of each alone."""
    for name in ("notebooks", "params"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / name / "synthetic.paper.jsonl" for name in ("a", "b")]
    for row in (_row(0, 1, True), _row(1, 1, True)):
        ResultStore(files[0]).append(row)
    for row in (_row(0, 2, True), _row(2, 1, False)):
        ResultStore(files[1]).append(row)
    return tmp_path / "outputs/results/synthetic.paper.jsonl", files


def test_rows_of_machines_come_together_in_the_file_of_their_name(places, capsys):
    into, files = places
    assert main(["results", "merge", *map(str, files)]) == 0
    assert capsys.readouterr().out == (
        f"{into}: 3 rows of new keys, 0 in place of an older or failed row of their key, 0 not needed: the newest "
        "successful row of a key counts\n"
    )
    assert {row["seed"]: row["metrics"]["accuracy"] for row in ResultStore(into).rows()} == {0: 2.0, 1: 1.0}
    ResultStore(files[1]).append(_row(2, 3, True))
    assert main(["results", "merge", *map(str, files)]) == 0
    assert "0 rows of new keys, 1 in place of" in capsys.readouterr().out and len(ResultStore(into).rows()) == 3
    assert main(["results", "merge", str(into), "--into", "elsewhere.jsonl"]) == 0
    assert ResultStore("elsewhere.jsonl").rows() == ResultStore(into).rows()


def test_rows_of_another_profile_are_not_merged(places, capsys):
    into, (one, other) = places
    wrong = into.with_name("synthetic.laptop.jsonl")
    assert main(["results", "merge", str(one), str(other), "--into", str(wrong)]) == 2
    assert capsys.readouterr().err == (
        f"lrm-recall: rows of profile paper do not belong into {wrong}, but into synthetic.paper.jsonl\n"
    )
    assert not wrong.exists()
    assert main(["results", "merge", str(one), str(other), "--into", "rows.bak"]) == 0  # named after no profile


def test_a_merge_that_cannot_be_is_one_line_and_changes_nothing(places, capsys, monkeypatch):
    into, (one, other) = places
    strange = other.with_name("synthetic.h100.jsonl")
    strange.write_text('{"key":"no row"}\n')
    for words, message in (
        ([one, "gone.jsonl", "--into", "x"], "there is no file gone.jsonl"),
        ([one, strange], "rows of synthetic.h100.jsonl, synthetic.paper.jsonl belong into different files"),
        ([one, strange, "--into", into], f"{strange}: line 1 is not a row of results: it lacks"),
    ):
        assert main(["results", "merge", *map(str, words)]) == 2
        assert capsys.readouterr().err.startswith(f"lrm-recall: {message}")
    assert not into.exists()
    assert main(["results", "merge", str(one)]) == 0
    before = into.read_bytes()
    real = os.write
    monkeypatch.setattr(results.os, "write", lambda file, data: real(file, data[:-9]))
    capsys.readouterr()
    assert main(["results", "merge", str(other)]) == 1
    assert capsys.readouterr().err.endswith(f"; {into} is as it was\n") and into.read_bytes() == before


def test_a_sweep_may_store_rows_while_others_are_merged(tmp_path):
    into = ResultStore(tmp_path / "quick.smoke.jsonl")
    code = ("import sys\nfrom sweep_runs import QuickRun, experiment\nfrom lrm_recall.results import ResultStore\n"
            "from lrm_recall.sweep import run_sweep\nruns = [QuickRun(seed) for seed in range(100, 200)]\n"
            "run_sweep(runs, experiment(), ResultStore(sys.argv[1]), profile='smoke', progress=False)")
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "lib", ROOT / "kernels")))
    writer = subprocess.Popen([sys.executable, "-c", code, into.path], env={**os.environ, "PYTHONPATH": path})
    chance = random.Random(0)
    while not into.path.exists():
        assert writer.poll() is None
        time.sleep(0.01)
    for seed in range(50):
        into.merge([_row(seed, 1, True), _row(seed + 1, 1, True)])
        time.sleep(chance.uniform(0, 0.002))
    assert writer.wait(timeout=60) == 0
    assert sorted(row["seed"] for row in into.rows()) == [*range(51), *range(100, 200)]
    assert len(into.path.read_text().splitlines()) == 151
