"""What holds for every notebook as a source: paired, stripped, and no function longer than ten lines."""

import ast
from pathlib import Path

import pytest

from lrm_recall.notebooks import unpaired, unstripped
from lrm_recall.parameters import declared_parameters
from lrm_recall.workbook import Workbook

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_source_is_stripped_and_paired(name):
    assert list(unstripped(Workbook(ROOT).read(name), name)) == []
    assert [problem for problem in unpaired(ROOT / "notebooks") if name in problem] == []


@pytest.mark.parametrize("profile", ("smoke", "laptop", "h100", "paper"))
def test_every_scale_has_every_notebook(profile):
    assert Workbook(ROOT).notebooks_of(profile) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_function_is_longer_than_ten_lines(name):
    trees = [ast.parse(cell.source) for cell in Workbook(ROOT).read(name).cells if cell.cell_type == "code"]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert functions and all(node.end_lineno - node.lineno < 10 for node in functions)


@pytest.mark.parametrize(("name", "parameter"), [("11_walkthrough_alpha_mixing", "pairs"),
                                                 ("12_walkthrough_head_merging", "seeds")])  # fmt: skip
def test_an_empty_list_is_refused_before_anything_is_trained(name, parameter):
    notebook = Workbook(ROOT).read(name)
    scope = {each: declared.default for each, declared in declared_parameters(notebook, name).items()}
    first = [cell.source for cell in notebook.cells if cell.cell_type == "code"][1]  # behind the parameters
    exec(compile(first, name, "exec"), dict(scope))
    with pytest.raises(ValueError, match=rf"{parameter} must list at least one value, got \[\]"):
        exec(compile(first, name, "exec"), scope | {parameter: []})
