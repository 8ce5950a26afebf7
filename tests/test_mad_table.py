"""Table 1 from made-up rows: which runs count, what a score averages over, when a verdict may say what."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache
from itertools import product

import pandas as pd
import pytest

from lrm_recall.figures.mad_table1 import mad_cells, mad_table1, mad_table1_markdown, verdict_counts
from lrm_recall.paper import paper_values
from lrm_recall.results import frame
from lrm_recall.rows import make_row
from lrm_recall.tasks.mad import LEARNING_RATES, TASKS, WEIGHT_DECAYS, MADTask, benchmark
from lrm_recall.train.mad_grid import mad_runs

PAPER = {(row.model, row.variant, row.task): row.value for row in paper_values("resona", 1).itertuples()}


def row(run, score: float, valid: float | None = None, profile: str = "paper", **fields) -> dict:
    """A row of a run that has this macro accuracy, in percent."""
    metrics = {"macro_accuracy": score / 100, "accuracy": score / 100, "sequence_accuracy": 0.0,
               "valid_accuracy": (score if valid is None else valid) / 100}
    return make_row(experiment="mad", config=asdict(run), seed=run.seed, code="c", profile=profile,
                    data={"source": "s", "revision": "r"}, machine={}, metrics=metrics) | fields


def runs_of(task: str = "memorization", mixer: str = "mamba", variants=("base",), **changes) -> list:
    """All runs that a cell of the paper needs."""
    runs = _grid(task, mixer, tuple(variants))
    return [replace(run, **changes) for run in runs] if changes else list(runs)


@cache  # a run takes 5 ms to check
def _grid(task: str, mixer: str, variants: tuple[str, ...]) -> list:
    return mad_runs(mixers=[mixer], tasks=benchmark([task]), variants=variants)


def cell(table: pd.DataFrame, mixer: str, variant: str, task: str) -> dict:
    here = (table["mixer"] == mixer) & (table["variant"] == variant) & (table["task"] == task)
    (found,) = table[here].to_dict("records")
    return found


def test_without_rows_every_cell_of_the_paper_is_not_run():
    for rows in (pd.DataFrame(), frame([row(runs_of()[0], 80.0, profile="laptop")])):
        table = mad_table1(rows, "paper")
        assert len(table) == 63 and verdict_counts(table)["not run"] == 63
        assert sorted(table["paper"]) == sorted(PAPER.values())
        assert list(table["model"].unique()) == ["Transformer", "Mamba", "Mamba2", "RWKV5", "Hyena"]
        assert mad_table1_markdown(table) == ("Of the 63 cells of Table 1: 0 reproduced, 0 trend only, "
                                              "0 not reproduced, 63 not run.")


def test_a_score_is_the_mean_over_settings_at_the_trial_that_validation_chose():
    scores = {512: 90.0, 1024: 80.0, 2048: 70.0, 4096: 60.0, 8192: 50.0, 256: 100.0}
    rows = []
    for run in runs_of():
        best = (run.learning_rate, run.weight_decay) == (LEARNING_RATES[1], WEIGHT_DECAYS[1])
        # the others look better on the test set, which must choose nothing
        rows.append(row(run, scores[run.task.vocab_size] + (0 if best else 5), valid=60 if best else 50))
    (found,) = mad_cells(frame(rows)).to_dict("records")
    assert found["macro"] == pytest.approx(75.0) and found["settings"] == 6 and found["gaps"] == []
    del rows[-1]  # one learning rate of one setting is missing
    (found,) = mad_cells(frame(rows)).to_dict("records")
    assert found["gaps"] == ["3 learning rates and 2 weight decays"]
    rows[-2] = row(runs_of()[-2], 99.9)  # but it is solved at another one
    (found,) = mad_cells(frame(rows)).to_dict("records")
    assert found["gaps"] == []


def test_seeds_are_averaged_and_the_newest_setup_counts():
    runs = [replace(run, seed=seed) for run in runs_of() for seed in (1, 2)]
    rows = [row(run, 80.0 + run.seed) for run in runs]
    rows += [row(replace(run, max_epochs=300), 20.0, created="2000-01-01T00:00:00.000+00:00") for run in runs]
    (found,) = mad_cells(frame(rows)).to_dict("records")
    assert found["macro"] == pytest.approx(81.5) and found["seeds"] == 2 and "200 epochs" in found["words"]


@pytest.mark.parametrize(
    ("change", "gap"),
    [
        ({"d_model": 64}, "hidden size 128"),
        ({"num_blocks": 1}, "2 or 4 blocks"),
        ({"max_epochs": 20}, "200 epochs"),
        ({"batch_size": 64}, "batches of 128"),
    ],
)
def test_less_than_the_papers_scale_is_named_and_never_reproduces(change, gap):
    paper = PAPER["Mamba", "base", "Mem."]
    rows = frame([row(run, paper) for run in runs_of(**change)])
    assert mad_cells(rows)["gaps"].item() == [gap]
    found = cell(mad_table1(rows, "paper"), "mamba", "base", "memorization")
    assert found["verdict"] == "trend only" and pd.isna(found["macro_paper"])
    assert found["macro_toy"] == pytest.approx(paper)


def test_the_base_setting_alone_is_toy_scale():
    rows = frame([row(run, 88.0) for run in runs_of() if run.task.vocab_size == 256])
    assert mad_cells(rows)["gaps"].item() == ["all 6 settings"]
    found = cell(mad_table1(rows, "paper"), "mamba", "base", "memorization")
    assert found["scale"].startswith("paper: 1 of 6 settings")


def test_settings_outside_the_benchmark_count_only_alone():
    odd = MADTask(task="memorization", vocab_size=64)
    (strange,) = mad_runs(mixers=["mamba"], tasks=[odd], variants=["base"], learning_rates=[1e-3], weight_decays=[0.0])
    known = [row(run, 50.0) for run in runs_of()]
    alone, both = mad_cells(frame([row(strange, 10.0)])), mad_cells(frame([row(strange, 10.0), *known]))
    assert alone["macro"].item() == pytest.approx(10.0) and "outside the benchmark" in alone["words"].item()
    assert both["macro"].item() == pytest.approx(50.0)
    found = cell(mad_table1(frame([row(strange, 88.5)]), "paper"), "mamba", "base", "memorization")
    assert found["verdict"] == "not run" and found["macro_toy"] == pytest.approx(88.5)


@pytest.mark.parametrize(
    ("base", "resona", "verdicts"),
    [
        (74.9, 99.0, ("reproduced", "reproduced")),
        (80.9, 99.0, ("trend only", "reproduced")),  # 6 off
        (50.0, 70.0, ("not reproduced", "trend only")),  # far off, but Resona helps
        (99.0, 99.5, ("not reproduced", "not reproduced")),  # no gain where the paper has one
        (74.9, None, ("reproduced", "not run")),
        (None, 99.0, ("not run", "not run")),  # nothing to compare with
    ],
)
def test_verdicts(base, resona, verdicts):
    rows = []
    for variant, score in (("base", base), ("resona1", resona)):
        if score is not None:
            rows += [row(run, score) for run in runs_of("noisy-in-context-recall", variants=[variant])]
    table = mad_table1(frame(rows), "paper")
    found = [cell(table, "mamba", variant, "noisy-in-context-recall")["verdict"] for variant in ("base", "resona1")]
    assert tuple(found) == verdicts


def test_resona_is_compared_with_a_base_of_the_same_settings_only():
    base = [row(run, 74.9) for run in runs_of("noisy-in-context-recall")]
    resona = [row(run, 99.0) for run in runs_of("noisy-in-context-recall", variants=["resona1"])]
    few = [each for each in resona if each["config"]["task"]["seq_len"] == 128]
    assert 0 < len(few) < len(resona)
    table = mad_table1(frame(base + few), "paper")
    assert cell(table, "mamba", "resona1", "noisy-in-context-recall")["verdict"] == "not run"


def test_a_model_that_is_solved_at_once_stands_beside_a_base_that_tried_everything():
    """Rates that are lacking are said of a cell that lacks them, and make no other setup of it."""
    task = "noisy-in-context-recall"
    base = [row(run, 80.0) for run in runs_of(task)]
    first = runs_of(task, variants=["resona1"])[0]
    solved = [run for run in runs_of(task, variants=["resona1"])
              if (run.learning_rate, run.weight_decay) == (first.learning_rate, first.weight_decay)]
    found = cell(mad_table1(frame(base + [row(run, 99.95) for run in solved]), "paper"), "mamba", "resona1", task)
    assert found["verdict"] == "reproduced" and "learning rates" not in found["scale"]
    found = cell(mad_table1(frame(base + [row(run, 90.0) for run in solved]), "paper"), "mamba", "resona1", task)
    assert "settings, 1 of 6 learning rates and decays" not in found["scale"]
    assert found["scale"].endswith(", 1 of 6 learning rates and decays")


def test_the_average_needs_all_tasks():
    rows = []
    for task, variant in product(TASKS, ("base", "resona1")):
        rows += [row(run, 50.0 if variant == "base" else 75.0) for run in runs_of(task, variants=[variant])]
    table = mad_table1(frame(rows), "paper")
    assert cell(table, "mamba", "base", "average")["macro_paper"] == pytest.approx(50.0)
    assert cell(table, "mamba", "resona1", "average")["verdict"] == "reproduced"  # 72.1 +- 5, and better than base
    some = mad_table1(frame([each for each in rows if each["config"]["task"]["task"] != "compression"]), "paper")
    assert cell(some, "mamba", "base", "average")["verdict"] == "not run"


def test_other_models_and_variants_have_no_verdict_but_a_line():
    rows = [row(run, 90.0) for run in runs_of(mixer="gla")] + [row(run, 95.0) for run in runs_of(variants=["resona0"])]
    table = mad_table1(frame(rows), "paper")
    assert cell(table, "gla", "base", "memorization")["verdict"] == ""
    assert len(table) == 64, "another variant than the one asked for has no line"
    text = mad_table1_markdown(table)
    assert "| GLA |" in text and "– / 90.0" in text
    assert text.startswith("At the paper's scale (paper: 6 of 6 settings, ")
    other = mad_table1(frame(rows), "paper", "resona0")
    assert cell(other, "mamba", "resona0", "memorization")["macro_paper"] == pytest.approx(95.0)
