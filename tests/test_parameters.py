"""Parameters: what a cell may declare, and every way in which a value may not fit."""

from __future__ import annotations

import pytest
from nbformat import v4

from lrm_recall.parameters import (
    ParameterError,
    check_values,
    declared_parameters,
    read_assignments,
    read_yaml,
)

CELL = """\
# What this run does.
seeds: list[int] = [0]  # one model each
learning_rate: float = 1.0e-3  # of AdamW
rates: list[float] = [1.0, 2.0]  # tried in turn
mixers: list[str] = ["gla", "mamba2"]  # the models
depth: int | None = None  # None: as in the paper
name: str = "x"  # of the figure
shape: dict[str, float] = {}  # widths
fast: bool = False  # skip the ablation
profile: str = "smoke"  # set by the runner
"""


def notebook(*sources: str, tag: str = "parameters"):
    cells = [v4.new_code_cell(source, metadata={"tags": [tag]}) for source in sources]
    return v4.new_notebook(cells=[v4.new_markdown_cell("# Title"), *cells])


def declared(source: str = CELL):
    return declared_parameters(notebook(source), "nb")


def problem(values: dict, source: str = CELL) -> str:
    with pytest.raises(ParameterError) as caught:
        check_values(values, declared(source), "file")
    return str(caught.value)


def test_a_cell_is_read_with_types_defaults_and_comments():
    parameters = declared()
    assert list(parameters)[:3] == ["seeds", "learning_rate", "rates"]
    assert parameters["depth"].default is None
    assert str(parameters["seeds"]) == "seeds: list[int] = [0]  # one model each"


def test_a_declaration_may_go_over_lines():
    (parameter,) = declared("rates: list[float] = [\n    1.0,\n]  # tried in turn\n").values()
    assert parameter.default == [1.0] and parameter.comment == "tried in turn"


def test_good_values_come_back_as_the_declared_types():
    values = {"learning_rate": 1, "rates": [1, 2.5], "depth": 3, "fast": True, "shape": {"a": 1}, "seeds": []}
    read = check_values(values, declared(), "file")
    assert read == values
    assert type(read["learning_rate"]) is float and type(read["rates"][0]) is float
    assert check_values({"depth": None}, declared(), "file") == {"depth": None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1.0}, "file: unknown parameter 'lerning_rate' (did you mean 'learning_rate'?); al"),
        ({"learning_rate": "1e-3"}, "file: learning_rate: YAML reads 1e-3 as text; write 1.0e-3"),
        ({"learning_rate": "1.5e3"}, "file: learning_rate: YAML reads 1.5e3 as text; write 1.5e+3"),
        ({"rates": [1.0, "5e-4"]}, "file: rates[1]: YAML reads 5e-4 as text; write 5.0e-4"),
        ({"depth": "3"}, "file: depth: YAML reads 3 as text; write 3"),
        ({"learning_rate": "fast"}, "file: learning_rate must be float, not 'fast' (str)"),
        ({"learning_rate": True}, "file: learning_rate must be float, not True (bool)"),
        ({"learning_rate": float("nan")}, "file: learning_rate must be float, not nan (float)"),
        ({"learning_rate": None}, "file: learning_rate must be float, not None (NoneType)"),
        ({"seeds": 0}, "file: seeds must be list[int], not 0 (int)"),
        ({"seeds": [0.5]}, "file: seeds must be list[int], not [0.5] (list)"),
        ({"depth": 1.0}, "file: depth must be int | None, not 1.0 (float)"),
        ({"fast": "yes"}, "file: fast must be bool, not 'yes' (str)"),
        ({"fast": 1}, "file: fast must be bool, not 1 (int)"),
        ({"mixers": "gla"}, "file: mixers must be list[str], not 'gla' (str)"),
        ({"mixers": [False]}, "file: mixers must be list[str], not [False] (list)"),
        ({"profile": "laptop"}, "file: profile is set by the command line, not as a parameter"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_one_clear_line(values, message):
    told = problem(values)
    assert told.startswith(message) and "\n" not in told


def test_every_problem_has_its_line():
    assert len(problem({"nothing": 1, "fast": 0, "seeds": "x"}).splitlines()) == 3


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("x = 1  # no type", "line 1: only `name: type = value  # comment` is allowed here"),
        ("x: int  # no value", "line 1: only `name: type = value"),
        ("import os", "line 1: only `name: type = value"),
        ("x: int = 1 + 1  # sum", "the value of x must be written out, not computed"),
        ("x: int = 1.5  # half", "x must be int, not 1.5 (float)"),
        ("x: int = 1", "x needs a comment that says what it is for"),
        ("x: Path = 'a'  # where", "the type of x must be made of int, float, bool, str, list, dict and"),
        ("x: int = 1  # a\nx: int = 2  # b", "declares x twice"),
        ("profile: int = 1  # a", "profile is set by the runner and must be str, not int"),
        ("x: int = (", "the parameters cell is not Python: line 1"),
    ],
)  # fmt: skip
def test_a_cell_that_holds_anything_else_is_refused(cell, message):
    with pytest.raises(ParameterError) as caught:
        declared(cell)
    assert str(caught.value).startswith("nb: ") and message in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("book", [notebook(), notebook(CELL, CELL), notebook(CELL, tag="Parameters")])
def test_exactly_one_cell_declares_parameters(book):
    with pytest.raises(ParameterError, match=r"nb: \d cells are tagged 'parameters'; there must be one"):
        declared_parameters(book, "nb")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0", "p.yaml: line 1: "),
        ("- 1\n- 2", "p.yaml: holds a list, not names with values"),
        ("just text", "p.yaml: holds a str, not names with values"),
        ("a: 1\nb: 2\na: 3", "p.yaml: line 3: a is given twice"),
        ("a: \x00", "p.yaml: not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ParameterError) as caught:
        read_yaml(path, "p.yaml")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_files_and_words_are_read_alike(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("seeds: [0, 1]\nrate: 1.0e-3\n")
    words = ["seeds=[0, 1]", "rate=1.0e-3"]
    assert read_yaml(path, "p") == read_assignments(words) == {"seeds": [0, 1], "rate": 1e-3}
    path.write_text("# nothing but this\n")
    assert read_yaml(path, "p") == {}


@pytest.mark.parametrize("word", ["seeds", "=3", "a b=1", "a=[1"])
def test_a_word_that_is_no_assignment_is_refused(word):
    with pytest.raises(ParameterError, match="-p "):
        read_assignments([word])
