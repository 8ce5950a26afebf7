"""Learning rates are tried in order, a solved cell is not trained again, and no cell waits for another."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrm_recall.results import ResultStore
from lrm_recall.sweep import Experiment
from lrm_recall.train.rates import RateTurns, sweep_rates
from lrm_recall.train.synthetic import MQARRun

RUN = MQARRun(mixer="gla", mixer_args={"num_heads": 2}, d_model=16, input_length=16, num_kv_pairs=2, vocab_size=64,
              learning_rate=0.01, num_train=8, target_accuracy=0.9)


def row(run: MQARRun, accuracy: float, status: str = "ok", key: str = "") -> dict:
    return {"key": key, "config": asdict(run), "seed": run.seed, "status": status,
            "metrics": {"valid_accuracy": accuracy}}  # fmt: skip


def turns_after(runs: list[MQARRun], rows: list[dict]) -> list[bool | None]:
    """Whose turn it is among runs, of which the rows are those of the first ones by their index."""
    turns = RateTurns({str(index): run for index, run in enumerate(runs)})
    for each in rows:
        turns.note(each)
    return [turns(str(index)) for index in range(len(runs))]


def test_a_cell_is_solved_when_every_seed_is_at_one_rate():
    runs = [replace(RUN, seed=seed, learning_rate=rate) for rate in (0.01, 0.001) for seed in (0, 1)]
    assert turns_after(runs, []) == [True, True, False, False]
    assert turns_after(runs, [row(runs[0], 0.95, key="0")]) == [True, True, False, False]
    assert turns_after(runs, [row(runs[0], 0.95, key="0"), row(runs[1], 0.5, key="1")])[2:] == [True, True]
    two_rates = [row(runs[0], 0.95, key="0"), row(runs[1], 0.5, key="1"), row(runs[3], 0.95, key="3")]
    assert turns_after(runs, two_rates)[2:] == [True, True]  # one seed at each
    failed = [row(runs[0], 0.95, key="0"), row(runs[1], 0.95, "failed", key="1")]
    assert turns_after(runs, failed)[2:] == [True, True]
    assert turns_after(runs, [row(runs[0], 0.95, key="0"), row(runs[1], 0.9, key="1")]) == [None] * 4


def test_no_target_is_never_reached():
    run = replace(RUN, target_accuracy=None)
    assert turns_after([run, replace(run, learning_rate=0.1)], [row(run, 1.0, key="0")]) == [True, True]


def test_rows_of_other_sweeps_say_nothing():
    assert turns_after([RUN], [row(RUN, 1.0, key="another")]) == [True]


# --- whole sweeps


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What `pretend` does: how good the cell becomes at the rates 1, 1/2, 1/3 and so on, and how long a run takes."""

    cell: int
    learning_rate: float
    accuracies: tuple[float, ...]
    weight_decay: float = 0.0
    seconds: float = 0.0
    target_accuracy: float = 0.9
    seed: int = 0


def pretend(run: Trial) -> dict:
    time.sleep(run.seconds)
    accuracy = run.accuracies[round(1 / run.learning_rate) - 1]
    if accuracy < 0:
        raise ValueError("no good")
    return {"metrics": {"valid_accuracy": accuracy, "at": time.time()}}


EXPERIMENT = Experiment("pretend", pretend, {"source": "s", "revision": "1"}, modules=lambda run: ["lrm_recall.rows"])


def swept(runs, path, **options):
    rows = sweep_rates(runs, EXPERIMENT, ResultStore(path), profile="smoke", progress=False, **options)
    return [(each["config"]["cell"], each["config"]["learning_rate"]) for each in rows]


def trials(accuracies: dict[int, list[float]]) -> list[Trial]:
    """Cells, each with its accuracy at one rate after the other; all first rates come first."""
    longest = max(map(len, accuracies.values()))
    return [Trial(cell=cell, learning_rate=1 / (1 + place), accuracies=tuple(values))
            for place in range(longest) for cell, values in accuracies.items() if place < len(values)]  # fmt: skip


def test_a_failed_rate_does_not_keep_the_next_one_away(tmp_path):
    with pytest.warns(UserWarning, match="1 of 2 runs failed"):
        assert swept(trials({0: [-1.0, 0.95, 0.99]}), tmp_path / "rows.jsonl") == [(0, 1.0), (0, 0.5)]


def test_a_sweep_that_was_cut_short_goes_on_where_it_was(tmp_path):
    runs = trials({0: [0.1, 0.2, 0.95, 0.99], 1: [0.95, 0.99, 0.99, 0.99]})
    swept([run for run in runs if run.learning_rate == 1.0], tmp_path / "rows.jsonl")
    done = ResultStore(tmp_path / "rows.jsonl").rows()
    assert swept(runs, tmp_path / "rows.jsonl") == [(0, 1.0), (1, 1.0), (0, 0.5), (0, 1 / 3)]
    assert ResultStore(tmp_path / "rows.jsonl").rows()[:2] == done


def test_no_run_is_started_after_the_deadline(tmp_path):
    assert swept(trials({0: [0.1, 0.2]}), tmp_path / "rows.jsonl", deadline=time.monotonic()) == []


def test_short_of_time_every_cell_has_its_first_rate_before_any_its_second(tmp_path):
    cheap_last = replace(EXPERIMENT, cost=lambda run: -run.cell)
    runs = sorted(trials({0: [0.1, 0.2], 1: [0.1, 0.2], 2: [0.1, 0.2]}), key=lambda run: run.cell)
    store = ResultStore(tmp_path / "rows.jsonl")
    sweep_rates(runs, cheap_last, store, profile="smoke", progress=False, deadline=time.monotonic() + 60)
    done = [(row["config"]["learning_rate"], row["config"]["cell"]) for row in store.rows()]
    assert done == [(1.0, 2), (1.0, 1), (1.0, 0), (0.5, 2), (0.5, 1), (0.5, 0)]


@given(st.dictionaries(st.integers(0, 4), st.lists(st.sampled_from([0.1, 0.5, 0.95]), min_size=3, max_size=3),
                       min_size=1))  # fmt: skip
def test_every_cell_is_tried_until_it_is_solved(tmp_path_factory, accuracies):
    found = swept(trials(accuracies), tmp_path_factory.mktemp("rates") / "rows.jsonl")
    for cell, values in accuracies.items():
        solved = next((place for place, value in enumerate(values) if value >= 0.9), len(values) - 1)
        assert [rate for other, rate in found if other == cell] == [1.0 / (1 + place) for place in range(solved + 1)]


def test_no_cell_waits_for_another(tmp_path):
    slow = [Trial(cell=0, learning_rate=1.0, accuracies=(0.1,), seconds=4.0)]
    quick = [Trial(cell=1, learning_rate=rate, accuracies=(0.1,) * 10, seconds=0.1) for rate in (1.0, 0.5, 0.1)]
    store = ResultStore(tmp_path / "rows.jsonl")
    rows = sweep_rates(slow + quick, EXPERIMENT, store, profile="smoke", progress=False, workers=2)
    at = {(each["config"]["cell"], each["config"]["learning_rate"]): each["metrics"]["at"] for each in rows}
    assert at[1, 1.0] < at[1, 0.5] < at[1, 0.1] < at[0, 1.0]
