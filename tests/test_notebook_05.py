"""Notebook 05 as a source: its shape, and the measurements that every profile asks for."""

from functools import partial

import notebook_scope
import pytest
from notebook_scope import PROFILES, WORKBOOK

NAME = "05_efficiency"


scope_of = partial(notebook_scope.scope_of, NAME, last="cold")


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
