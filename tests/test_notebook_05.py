"""Notebook 05 as a source: its shape, and the measurements that every profile asks for."""

from functools import cache
from pathlib import Path

import pytest

from lrm_recall.parameters import declared_parameters
from lrm_recall.workbook import Workbook

ROOT = Path(__file__).resolve().parents[1]
NAME = "05_efficiency"
WORKBOOK = Workbook(ROOT)
PROFILES = ("smoke", "laptop", "h100", "paper")


@cache
def scope_of(profile: str) -> dict:
    """The names that the notebook has defined once its runs are listed, as on a CPU; nothing is measured."""
    notebook = WORKBOOK.read(NAME)
    declared = declared_parameters(notebook, NAME)
    scope = {name: parameter.default for name, parameter in declared.items()}
    scope |= WORKBOOK.values(NAME, profile, declared) | {"profile": profile, "device": "cpu"}
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    until = next(index for index, source in enumerate(code) if "\ncold =" in source)
    for source in code[1 : until + 1]:
        exec(compile(source, NAME, "exec"), scope)
    return scope


def test_first_cell_says_what_is_tested():
    first = WORKBOOK.read(NAME).cells[0]
    assert first.source.startswith("# ") and "Claim" in first.source and "Tables 5, 6 and 7" in first.source


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_asks_for_measurements_that_can_be(profile):
    scope = scope_of(profile)
    for mixer in scope["mixers"]:
        variants = {run.variant for run in scope["main"] if run.mixer == mixer}
        assert variants == ({"base"} if mixer == "attention" else {"base", "resona"})
    assert {run.variant for run in scope["states"]} == {"base", "expanded"}
    assert {run.task for run in scope["training"]} == {"train"} and len(scope["cold"]) == len(scope["cold_mixers"])


def test_the_paper_profile_has_every_length_of_the_tables_at_the_papers_size():
    scope = scope_of("paper")
    lengths = {2048 * 2**n for n in range(7)}
    assert {run.length for run in scope["main"] if run.task == "prefill"} == lengths
    assert {run.length for run in scope["main"] if run.task == "decode"} == lengths
    assert set(scope["mixers"]) == {"attention", "mamba", "deltanet", "gla"} and scope["new_tokens"] == 128
    assert {(run.hidden_size, run.dtype) for run in scope["main"]} == {(2048, "bfloat16")}
    assert {tuple(run.resona["layers"]) for run in scope["main"] if run.resona} == {(0, 12, 23), (0, 24, 47)}
