"""Notebook 01 as a source: its shape, its parameter files, and the grids that every profile asks for."""

from dataclasses import asdict
from functools import partial

import notebook_scope
import pytest
from notebook_scope import PROFILES, WORKBOOK

from lrm_recall.figures.mqar_cells import mqar_cells
from lrm_recall.figures.verdicts import paper_scale_gaps
from lrm_recall.parameters import declared_parameters
from lrm_recall.results import frame, make_row

NAME = "01_synthetic"


@pytest.fixture(scope="module")
def notebook():
    return WORKBOOK.read(NAME)


scope_of = partial(notebook_scope.scope_of, NAME, last="control")


def test_first_cell_says_what_is_tested(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "Claim" in first.source and "Figure 5" in first.source and "Tables 11 and 1" in first.source


def test_defaults_are_the_smoke_values(notebook):
    declared = declared_parameters(notebook, NAME)
    assert WORKBOOK.values(NAME, "smoke", declared) == {}
    assert declared["profile"].default == "smoke" and declared["INTERACTIVE"].default is False


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_asks_for_runs_that_can_be(profile):
    scope = scope_of(profile)
    main = scope["main"]
    assert len(main) == (len(scope["mixers"]) * len(scope["lengths"]) * len(scope["d_models"])
                         * len(scope["variants"]) * len(scope["learning_rates"]) * len(scope["seeds"]))
    assert {run.batch_size for run in main} == {batch_size for *_, batch_size in scope["lengths"]}
    with_resona = [run.resona for run in main if run.resona]
    assert with_resona and all(options | scope["resona"] == options for options in with_resona)
    for runs in (scope["ablation"], scope["control"]):  # each holds the settings in use, and trains them once
        assert any(run in main and run.resona for run in runs) and any(run not in main for run in runs)


def test_profiles_cover_what_the_issue_asks():
    cells = {profile: {(run.mixer, run.input_length, run.num_kv_pairs, run.d_model, run.variant)
                       for run in scope_of(profile)["main"]} for profile in PROFILES}
    assert len({length for _, length, *_ in cells["smoke"]}) == 1 and len({mixer for mixer, *_ in cells["smoke"]}) == 2
    wanted = {(mixer, length, pairs, d_model, variant) for mixer in ("baseconv", "gla", "mamba2", "attention")
              for length, pairs in ((64, 4), (128, 8)) for d_model in (32, 64)
              for variant in ("base", "resona0", "resona2")}
    assert wanted <= cells["laptop"] <= cells["paper"] == cells["h100"]
    assert {(length, pairs) for _, length, pairs, *_ in cells["paper"]} == {(64, 4), (128, 8), (256, 16), (512, 32)}
    assert {d_model for *_, d_model, _ in cells["paper"]} == {32, 64, 128, 256}


def test_only_the_paper_profile_is_at_the_papers_scale():
    metrics = {name: 0.5 for name in ("accuracy", "sequence_accuracy", "valid_accuracy", "epochs", "state_size",
                                      "parameters")}
    for profile in PROFILES:
        rows = [make_row(experiment="mqar", config=asdict(run), seed=run.seed, code="c", profile=profile,
                         data={"source": "s", "revision": "r"}, machine={}, metrics=metrics)
                for run in scope_of(profile)["main"]]
        cells = mqar_cells(frame(rows)).to_dict("records")
        assert {not paper_scale_gaps(cell) for cell in cells} == {profile == "paper"}
