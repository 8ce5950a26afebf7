"""Notebook 02 as a source: its shape, its parameter files, and the runs that every profile asks for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import notebook_scope
import pytest
from notebook_scope import WORKBOOK

from lrm_recall.data import read_corpus
from lrm_recall.figures.lm_table2 import PAPER_SHAPES
from lrm_recall.parameters import declared_parameters
from lrm_recall.train.lm_grid import expected_seconds, parameter_count

ROOT = Path(__file__).resolve().parents[1]
NAME = "02_wikitext_lm"
PROFILES = (*notebook_scope.PROFILES, "wikipedia", "paper_shape")


def scope_of(profile: str) -> dict:
    """The names that the notebook has defined once its grids are made; no corpus is prepared, nothing is trained."""
    return notebook_scope.scope_of(NAME, profile, "main", makes_runs)


def makes_runs(source: str) -> bool:
    return "def grid(" in source or "main = grid(" in source


@cache
def sizes_of(profile: str) -> dict[tuple[str, str], int]:
    """Parameters by mixer and variant."""
    return {(run.mixer, run.variant): parameter_count(run) for run in scope_of(profile)["main"]}


def test_first_cell_says_what_is_tested():
    first = WORKBOOK.read(NAME).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "Claim" in first.source and "Table 2" in first.source and "Table 8" in first.source


def test_defaults_are_the_smoke_values():
    declared = declared_parameters(WORKBOOK.read(NAME), NAME)
    assert WORKBOOK.values(NAME, "smoke", declared) == {}
    assert declared["profile"].default == "smoke" and declared["INTERACTIVE"].default is False


def test_no_function_of_the_notebook_is_long():
    for cell in WORKBOOK.read(NAME).cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            body = cell.source.partition("def ")[2]
            assert len(body.splitlines()) <= 10


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_asks_for_runs_that_can_be(profile):
    scope = scope_of(profile)
    read_corpus(scope["corpus"])
    combinations = len(scope["mixers"]) * len(scope["variants"]) * len(scope["seeds"])
    nothing_to_match = profile in ("h100", "wikipedia", "paper")  # there Resona adds nothing to Hymba
    assert len(scope["main"]) == combinations - nothing_to_match
    assert all(run.resona["alpha"] == 1.0 for run in scope["control"])
    assert all(run.packed for run in scope["packed"]) and not any(run.packed for run in scope["main"])
    assert len(set(map(repr, scope["runs"]))) == len(scope["runs"])


@pytest.mark.parametrize("profile", PROFILES)
def test_size_matched_models_match(profile):
    size = sizes_of(profile)
    for mixer in scope_of(profile)["mixers"]:
        if (mixer, "sp") not in size:
            assert size[mixer, "resona"] == pytest.approx(size[mixer, "base"], rel=0.03)
        elif profile == "paper":  # the paper's own width, wider than our Resona needs
            assert size[mixer, "sp"] > size[mixer, "resona"]
        else:
            assert size[mixer, "sp"] == pytest.approx(size[mixer, "resona"], rel=0.05)


def test_profiles_cover_what_the_issue_asks():
    everything = {(mixer, variant) for mixer in PAPER_SHAPES for variant in ("base", "sp", "resona")}
    for profile, lacking in (("laptop", set()), ("paper", {("hymba", "sp")})):
        asked = {(run.mixer, run.variant) for run in scope_of(profile)["main"] if run.mixer in PAPER_SHAPES}
        assert asked == everything - lacking
    sizes = {profile: [size / 1e6 for size in sizes_of(profile).values()] for profile in PROFILES}
    assert min(sizes["laptop"]) > 2.5 and max(sizes["laptop"]) < 4
    assert min(sizes["h100"]) > 20 and max(sizes["paper"]) < 160
    for run in scope_of("paper")["main"]:
        layers, width, matched = PAPER_SHAPES[run.mixer]
        assert (run.num_layers, run.hidden_size) == (layers, matched if run.variant == "sp" else width)
        assert (run.steps, run.learning_rate, run.weight_decay, run.max_grad_norm) == (8000, 1e-3, 0.01, 1.0)


def test_a_backbone_with_other_options_is_asked_for_in_every_variant():
    scope = scope_of("laptop")
    assert {run.variant for run in scope["other_mixers"]} == {"base", "sp", "resona"}
    assert all(run.mixer_args == {"num_heads": 4, "use_gate": True} for run in scope["other_mixers"])


def test_small_profiles_take_minutes():
    """On two idle cores, by the cost hints, which leave out starting and scoring: about as long again at smoke."""
    cost = {profile: sum(map(expected_seconds, scope_of(profile)["runs"])) / 2 for profile in ("smoke", "laptop")}
    assert cost["smoke"] < 60 and cost["laptop"] < 3000


def test_the_papers_vocabulary_gives_the_sizes_that_the_readme_says():
    sizes = [f"{sizes_of('paper')[mixer, 'base'] / 1e6:.1f}M" for mixer in ("gla", "deltanet", "retnet")]
    assert "{}, {} and {} for GLA, DeltaNet, RetNet".format(*sizes) in (ROOT / "README.md").read_text()
