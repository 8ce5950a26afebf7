"""What the sliders of a walkthrough can be set to, read from its source: a test that sweeps them cannot fall behind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product
from typing import Any

import nbformat


def controls(notebook: nbformat.NotebookNode) -> list[dict[str, list[Any]]]:
    """Of each `explore(draw, **controls)`, in their order: control -> its values, the one it starts at first.

    A control's values must be written with constants, tuples, lists and `range`.
    """
    calls = [node for cell in notebook.cells if cell.cell_type == "code" for node in ast.walk(ast.parse(cell.source))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "explore"]
    return [{keyword.arg: _values(ast.unparse(keyword.value)) for keyword in call.keywords} for call in calls]


def combinations(of: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Every way to set the controls of one figure."""
    return (dict(zip(of, values, strict=True)) for values in product(*of.values()))


def _values(source: str) -> list[Any]:
    written = eval(source, {"__builtins__": {"list": list, "range": range}})
    if isinstance(written, list):
        return written
    low, high, step = (*written, 1)[:3]
    return [low + i * step for i in range(round((high - low) / step) + 1)]
