"""What holds for every notebook as a source: paired, stripped, and no function longer than ten lines."""

import ast
from pathlib import Path

import pytest

from lrm_recall.notebooks import unpaired, unstripped
from lrm_recall.workbook import Workbook

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_source_is_stripped_and_paired(name):
    assert list(unstripped(Workbook(ROOT).read(name), name)) == []
    assert [problem for problem in unpaired(ROOT / "notebooks") if name in problem] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_function_is_longer_than_ten_lines(name):
    trees = [ast.parse(cell.source) for cell in Workbook(ROOT).read(name).cells if cell.cell_type == "code"]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    assert functions and all(node.end_lineno - node.lineno < 10 for node in functions)
