"""Sweeps: only what is missing is run, failures are kept apart, Dask workers come and go."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_runs import QuickRun, experiment, forgets_metrics, quick_run

from lrm_recall import provenance
from lrm_recall.claims import Claims
from lrm_recall.progress import SweepProgress, duration
from lrm_recall.results import ResultStore, StoreError
from lrm_recall.rows import make_row
from lrm_recall.sweep import Experiment, deadline_after, plan_sweep, run_sweep, shard_of

quietly = functools.partial(run_sweep, profile="smoke", progress=False)


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(tmp_path / "quick.smoke.jsonl")


def specs(tmp_path, *behaviours: str) -> list[QuickRun]:
    return [QuickRun(seed, behaviour, log=str(tmp_path / "log")) for seed, behaviour in enumerate(behaviours)]


def begun(tmp_path) -> list[int]:
    """Seeds of the runs that were begun since the last call."""
    log = tmp_path / "log"
    seeds = [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(seeds)


def statuses(rows) -> list[str]:
    return [row["status"] for row in rows]


# --- one process


def test_only_missing_runs_are_done_and_duplicates_once(store, tmp_path):
    runs = specs(tmp_path, "ok", "ok", "ok")
    seen = []
    thrice = [runs[1], runs[0], runs[1]]
    rows = quietly(thrice, experiment(), store, on_row=lambda row: seen.append(row["key"]))
    assert begun(tmp_path) == [0, 1]
    assert [row["seed"] for row in rows] == [1, 0]
    assert seen == [row["key"] for row in rows]
    rows = quietly(runs, experiment(), store)
    assert begun(tmp_path) == [2]
    assert [row["metrics"]["accuracy"] for row in rows] == [0.0, 2.0, 4.0]
    assert rows == [store.get(row["key"]) for row in rows]


def test_a_row_says_what_was_run_and_where(store, tmp_path):
    (row,) = quietly(specs(tmp_path, "ok"), experiment(), store)
    assert row["experiment"] == "quick" and row["profile"] == "smoke"
    assert row["config"] == {"seed": 0, "behaviour": "ok", "sleep_s": 0.0, "log": str(tmp_path / "log")}
    assert row["machine"] == provenance.machine()
    assert len(row["history"]) == 200 and row["runtime_s"] > 0


def test_a_failed_run_stops_no_other_and_is_retried_on_request_only(store, tmp_path):
    runs = specs(tmp_path, "raise", "ok", "nan", "ok")
    with pytest.warns(UserWarning, match=r"2 of 4 runs failed; the first, .*: RuntimeError: no such luck"):
        rows = quietly(runs, experiment(), store)
    assert statuses(rows) == ["failed", "ok", "failed", "ok"]
    assert rows[0]["error"].startswith("RuntimeError: no such luck (sweep_runs.py:")
    assert rows[2]["error"] == "metrics.accuracy is not a finite number: the run has diverged"
    assert begun(tmp_path) == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match=r"2 of them earlier \(retry_failed=True tries those again\)"):
        assert statuses(quietly(runs, experiment(), store)) == ["failed", "ok", "failed", "ok"]
    assert begun(tmp_path) == []
    with pytest.warns(UserWarning, match="2 of 4 runs failed;"):
        quietly(runs, experiment(), store, retry_failed=True)
    assert begun(tmp_path) == [0, 2]


def test_fresh_runs_everything_again(store, tmp_path):
    runs = specs(tmp_path, "ok", "ok")
    first = quietly(runs, experiment(), store)
    again = quietly(runs, experiment(), store, fresh=True)
    assert begun(tmp_path) == [0, 0, 1, 1]
    assert [row["key"] for row in again] == [row["key"] for row in first]
    assert store.rows() == again != first


def test_a_plan_lists_what_is_missing_and_runs_nothing(store, tmp_path):
    runs = specs(tmp_path, "ok", "raise", "ok")
    with pytest.warns(UserWarning, match="1 of 2 runs failed"):
        rows = quietly(runs[:2], experiment(), store)
    begun(tmp_path)
    plan = plan_sweep(runs, experiment(cost=lambda run: 200.0), store)
    assert begun(tmp_path) == []
    assert plan.stored == [rows[0]["key"]] and list(plan.failed) == [rows[1]["key"]]
    assert len(plan.keys) == 3 and plan.missing == plan.keys[2:]
    head, todo, failed = str(plan).splitlines()
    assert head == "quick: 3 runs, 1 stored, 1 to do, 1 failed earlier, about 3 min of work"
    assert f"{plan.missing[0]}  3 min, seed=2, behaviour='ok'" in todo
    assert rows[1]["key"] in failed and "no such luck" in failed


def test_a_result_of_another_shape_is_a_failed_run(store, tmp_path):
    with pytest.warns(UserWarning, match="a run returns a dict with metrics"):
        assert statuses(quietly(specs(tmp_path, "ok"), experiment(forgets_metrics), store)) == ["failed"]


def test_a_corrupt_store_stops_the_sweep_before_anything_runs(store, tmp_path):
    store.path.write_text("not json\n")
    with pytest.raises(StoreError, match="line 1 is not JSON"):
        quietly(specs(tmp_path, "ok"), experiment(), store)
    assert begun(tmp_path) == [] and store.path.read_text() == "not json\n"


@dataclass(frozen=True)
class Seedless:
    size: int = 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"seed": 0}, "an instance of a dataclass"),
        (QuickRun, "an instance of a dataclass"),
        (Seedless(), "needs an integer field `seed`"),
        (QuickRun(0, sleep_s=float("nan")), "not JSON compliant"),
    ],
)
def test_a_description_that_cannot_be_a_row_is_refused(store, spec, message):
    with pytest.raises(ValueError, match=message):
        quietly([spec], experiment(), store)
    assert not store.path.exists()


@pytest.mark.parametrize("run", [lambda spec: {}, functools.partial(lambda spec: {})])
def test_a_function_that_workers_cannot_import_is_refused(run):
    with pytest.raises(ValueError, match="function at the top of a module, not test_sweep"):
        experiment(run)


def test_data_needs_source_and_revision():
    with pytest.raises(ValueError, match="data lacks revision, source"):
        Experiment("quick", quick_run, {}, modules=lambda spec: [])


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(store, tmp_path, workers):
    with pytest.raises(ValueError, match=f"workers is {workers}"):
        quietly(specs(tmp_path, "ok"), experiment(), store, workers=workers)


# --- short of time


def test_a_budget_becomes_a_deadline():
    before = time.monotonic()
    assert deadline_after(None) is None and before + 60 <= deadline_after(60) <= time.monotonic() + 60
    with pytest.raises(ValueError, match="budget must be at least 0, got -1"):
        deadline_after(-1)


def test_no_run_is_started_after_the_deadline_and_the_cheapest_go_first(store, tmp_path):
    runs = [QuickRun(seed, sleep_s=0.4, log=str(tmp_path / "log")) for seed in range(4)]
    costs = experiment(cost=lambda run: 10.0 - run.seed)
    rows = quietly(runs, costs, store, deadline=time.monotonic() + 1.1)
    assert [row["seed"] for row in rows] == [2, 3] and begun(tmp_path) == [2, 3]
    assert quietly(runs[:2], costs, store, deadline=time.monotonic() - 1) == [] and begun(tmp_path) == []
    assert len(quietly(runs, costs, store, deadline=time.monotonic() + 60)) == 4 and begun(tmp_path) == [0, 1]


@pytest.mark.parametrize(("last", "started"), [(11, False), (40, True)])
def test_no_run_is_started_that_would_end_after_the_deadline(store, tmp_path, last, started):
    """The first takes long for its cost, which says nothing of larger ones; of one so large that none has been seen
    nobody knows. The last would begin in time in both cases."""
    costs, lasting = [0.01, 6, 6, last], [0.3, 0.5, 0.5, 0.1]
    runs = [QuickRun(seed, sleep_s=lasting[seed], log=str(tmp_path / "log")) for seed in range(4)]
    rows = quietly(runs, experiment(cost=lambda run: costs[run.seed]), store, deadline=time.monotonic() + 2)
    assert [row["seed"] for row in rows] == [0, 1, 2, 3][: 3 + started]


def test_a_slow_first_run_does_not_speak_for_the_others(store, tmp_path):
    """It may have compiled for all of them. Of runs that cost nothing nothing is expected."""
    lasting = [0.8] + 9 * [0.01]
    runs = [QuickRun(seed, sleep_s=lasting[seed], log=str(tmp_path / "log")) for seed in range(10)]
    assert len(quietly(runs, experiment(cost=lambda run: 5.0), store, deadline=time.monotonic() + 1.5)) == 10
    more = [QuickRun(seed, log=str(tmp_path / "log")) for seed in range(10, 14)]
    assert len(quietly(more, experiment(cost=lambda run: 0.0), store, deadline=time.monotonic() + 60)) == 4


class NeverTheirTurn:
    """As for runs that wait for one which there was no time for."""

    def __call__(self, key):
        return False

    def rank(self, key):
        return 0


def test_a_sweep_does_not_wait_for_runs_that_nobody_does(store, tmp_path):
    runs = [QuickRun(seed, log=str(tmp_path / "log")) for seed in range(2)]
    begin = time.monotonic()
    assert quietly(runs, experiment(), store, deadline=begin + 120, turns=NeverTheirTurn()) == []
    assert time.monotonic() - begin < 60 and begun(tmp_path) == []


# --- machines that share nothing


@given(costs=st.lists(st.floats(0.1, 100), min_size=1, max_size=30), count=st.integers(1, 6))
def test_shards_are_all_the_groups_once_and_about_even(costs, count):
    groups = {f"group {index}": cost for index, cost in enumerate(costs)}
    shards = [shard_of(groups, index, count) for index in range(count)]
    assert sorted(group for shard in shards for group in shard) == sorted(groups)
    loads = [sum(groups[group] for group in shard) for shard in shards]
    assert max(loads) - min(loads) <= max(costs) + 1e-6
    with pytest.raises(ValueError, match=f"there are shards 0 to {count - 1}, not {count}"):
        shard_of(groups, count, count)


# --- sweeps that share a store


def test_a_claim_is_held_by_one_sweep_until_it_is_given_back(store):
    one, other = Claims(store.path), Claims(store.path)
    assert one.take("a" * 16) and not other.take("a" * 16) and other.take("b" * 16)
    one.release("a" * 16)
    assert other.take("a" * 16) and not one.take("a" * 16)
    folder = store.path.with_name(store.path.name + ".claims")
    one.close()
    assert folder.is_dir(), "the other still needs it"
    other.close()
    assert not folder.exists()
    assert one.take("a" * 16), "a sweep may go on after all"
    one.close()


def test_many_threads_never_hold_a_claim_at_once(store):
    holders, worst, failures = [], [], []

    def work():
        claims = Claims(store.path)
        try:
            for _ in range(20):
                while not claims.take("a" * 16):
                    time.sleep(0.0001)
                holders.append(1)
                worst.append(len(holders))
                time.sleep(0.0002)
                holders.pop()
                claims.release("a" * 16)
            claims.close()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and worst == [1] * 160


@pytest.mark.parametrize("retry", [False, True])
@pytest.mark.parametrize("error", [None, "RuntimeError: elsewhere"])
def test_a_row_that_lands_during_the_sweep_is_taken_and_not_done_again(store, tmp_path, error, retry):
    first, second = specs(tmp_path, "ok", "ok")
    plan = plan_sweep([first, second], experiment(), store)

    def lands(row):
        if row["seed"] == 0:  # another sweep on this store ends the second run meanwhile
            store.append(make_row(experiment="quick", config=vars(second), seed=1, data={"source": "", "revision": "1"},
                                  code=plan.codes[plan.missing[1]], profile="smoke", machine={}, error=error,
                                  metrics={"accuracy": 7.0}))  # fmt: skip

    if error:
        with pytest.warns(UserWarning, match="1 of 2 runs failed"):
            rows = quietly([first, second], experiment(), store, on_row=lands, retry_failed=retry)
    else:
        rows = quietly([first, second], experiment(), store, on_row=lands, retry_failed=retry)
    assert begun(tmp_path) == [0]
    assert rows[1]["metrics"] == {"accuracy": 7.0} and rows[1]["error"] == error


def test_a_failure_from_before_is_retried_although_its_row_is_there(store, tmp_path):
    runs = specs(tmp_path, "raise")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 1 runs failed"):
            quietly(runs, experiment(), store, retry_failed=True)
    assert begun(tmp_path) == [0, 0]


def test_a_run_in_other_hands_is_waited_for(store, tmp_path):
    (run,) = specs(tmp_path, "ok")
    (key,) = plan_sweep([run], experiment(), store).missing
    other = Claims(store.path)
    assert other.take(key)
    given_back = threading.Timer(0.8, other.close)  # it gives up
    given_back.start()
    start = time.monotonic()
    assert len(quietly([run], experiment(), store)) == 1 and begun(tmp_path) == [0]
    assert time.monotonic() - start > 0.7
    assert other.take(key)
    another = QuickRun(0, log=str(tmp_path / "other"))
    soon = time.monotonic() + 10
    assert len(quietly([another], experiment(), store, deadline=soon)) == 1, "it waits for its own runs alone"
    other.close()


# --- Dask workers


def test_workers_survive_a_run_that_kills_one(store, tmp_path):
    runs = specs(tmp_path, "ok", "die", "ok", "raise", "ok", "ok")
    before = os.environ.get("OMP_NUM_THREADS")
    with pytest.warns(UserWarning, match="2 of 6 runs failed"):
        rows = quietly(runs, experiment(), store, workers=2)
    assert statuses(rows) == ["ok", "failed", "ok", "failed", "ok", "ok"]
    assert rows[1]["error"].startswith("lost worker: the process died during the run")
    assert rows[3]["error"].startswith("RuntimeError: no such luck")
    processes = {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}
    assert str(os.getpid()) not in processes and len(processes) >= 2
    assert begun(tmp_path) == [0, 1, 2, 3, 4, 5]  # the run that died was not handed to the next worker
    assert os.environ.get("OMP_NUM_THREADS") == before  # one thread is for the workers, not for us


def test_a_cluster_is_reached_by_its_address(store, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, host="127.0.0.1", protocol="tcp",
        dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False},
    ) as cluster:  # fmt: skip
        rows = quietly(specs(tmp_path, "ok", "ok"), experiment(), store, workers=cluster.scheduler_address)
    assert statuses(rows) == ["ok", "ok"] and len(store.rows()) == 2


def test_an_address_where_nobody_answers_is_one_error(store, tmp_path, monkeypatch):
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}),
        pytest.raises(ConnectionError, match="no Dask scheduler answers at 'tcp://127.0.0.1:9'"),
    ):
        quietly(specs(tmp_path, "ok"), experiment(), store, workers="tcp://127.0.0.1:9")
    assert not store.path.exists()


# --- the progress bar


def test_the_bar_tells_runs_failures_and_time(store, tmp_path, capsys):
    with pytest.warns(UserWarning):
        run_sweep(specs(tmp_path, "ok", "raise"), experiment(), store, profile="smoke")
    text = capsys.readouterr().err
    assert "quick: 0/2" in text and "time left unknown" in text
    assert "quick: 2/2" in text and "1 failed" in text


def test_the_estimate_starts_from_hints_and_learns_from_runs():
    hints = {"a": 100.0, "b": 100.0, "c": 200.0}
    with SweepProgress("x", hints, hints, workers=2, show=False) as bar:
        assert bar.seconds_left() == pytest.approx(200, abs=1)
        bar.finished("a", 50.0, failed=False)  # half of what the hint said
        assert bar.seconds_left() == pytest.approx(100, abs=1)
        bar.finished("b", 1.0, failed=True)
        assert bar.seconds_left() == pytest.approx(75, abs=1)
        bar.unneeded(["c"])
        assert bar.seconds_left() == pytest.approx(25, abs=1)
    with SweepProgress("x", ["a", "b"], None, workers=1, show=False) as bar:
        assert bar.seconds_left() is None
        bar.finished("a", 10.0, failed=False)
        assert bar.seconds_left() == pytest.approx(20, abs=1)


def test_the_pace_counts_where_quick_runs_promise_too_much(monkeypatch):
    with SweepProgress("x", [], dict.fromkeys(map(str, range(100)), 100.0), workers=10, show=False) as bar:
        for key in range(40):  # each took 5 s, so 100 of them take 50 s, ten at a time
            bar.finished(str(key), 5.0, failed=False)
        monkeypatch.setattr("lrm_recall.progress.time.monotonic", lambda: bar._start + 80)  # and yet 80 s have gone
        assert bar.seconds_left() == pytest.approx(80 * 55 / 45, rel=1e-6)  # 40 done, ten half done


def test_durations_are_for_people():
    assert [duration(s) for s in (4.4, 99, 100, 5_940, 6_000, 7_500)] == [
        "4 s", "99 s", "2 min", "99 min", "1 h 40 min", "2 h 05 min"
    ]  # fmt: skip


# --- provenance


def python(code: str, path: Path) -> str:
    """What a fresh Python prints, with the packages under `path`."""
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A copy of the module at another place, outside git."""
    (tmp_path / "lrm_recall").mkdir()
    (tmp_path / "lrm_recall" / "provenance.py").write_text(Path(provenance.__file__).read_text())
    return tmp_path


def test_provenance_works_outside_git(elsewhere):
    code = "from lrm_recall.provenance import *; print(commit()); print(describe(snapshot(), seed=3))"
    told = python(code, elsewhere)
    assert told.startswith("None\ncommit    not in git\n") and told.endswith("seed      3\n")


def test_the_commit_says_when_the_code_differs(elsewhere):
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *words]
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit() -> str:
        return python("from lrm_recall.provenance import commit; print(commit())", elsewhere).strip()

    rows = elsewhere / "outputs" / "rows"
    rows.parent.mkdir()
    rows.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    name = git("rev-parse", "--short=12", "HEAD")
    rows.write_text("2")
    assert commit() == name
    with (elsewhere / "lrm_recall" / "provenance.py").open("a") as source:
        source.write("# changed\n")
    assert commit() == f"{name}-dirty"


def test_a_sweep_starts_quickly():
    """Importing it loads none of the libraries that take seconds."""
    code = "import sys, lrm_recall.sweep; print({'torch', 'pandas', 'distributed'} & set(sys.modules))"
    assert python(code, Path(provenance.__file__).parents[1]).strip() == "set()"
