"""Notebook sources as git should see them: stripped of output, and each with its text pair in step.

A pair is notebooks/NN_name.ipynb, which people open, and notebooks/NN_name.py (jupytext, py:percent), which
people review.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat


def title(notebook: nbformat.NotebookNode) -> str:
    """The first heading of a notebook."""
    for cell in notebook.cells:
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            if line.startswith("#"):
                return line.lstrip("# ")
    return "(no title)"


def unstripped(notebook: nbformat.NotebookNode, name: str) -> Iterator[str]:
    """What a source notebook holds that only running it can have put there, a line each."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            clear = f"jupyter nbconvert --clear-output --inplace notebooks/{name}.ipynb"
            yield f"notebooks/{name}.ipynb is not stripped: cell {number} holds output ({clear})"
            return
    for key in ("papermill", "widgets", "lrm_recall"):
        if key in notebook.metadata:
            yield f"notebooks/{name}.ipynb is not stripped: its metadata holds {key!r}"


def unpaired(folder: Path) -> Iterator[str]:
    """Notebooks without their text pair, texts without notebook, and pairs that differ, a line each."""
    import jupytext

    names = {path.stem for path in folder.glob("*.ipynb")} | {path.stem for path in folder.glob("*.py")}
    for name in sorted(names):
        notebook, text = folder / f"{name}.ipynb", folder / f"{name}.py"
        if lacking := next((path for path in (notebook, text) if not path.is_file()), None):
            yield f"notebooks/{lacking.name} is missing (jupytext --sync makes it from its pair)"
        elif _cells(jupytext.read(notebook)) != _cells(jupytext.read(text, fmt="py:percent")):
            yield f"notebooks/{name}.ipynb and {name}.py differ (jupytext --sync {notebook.name})"


def _cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str, list[str]]]:
    return [(cell.cell_type, cell.source.rstrip(), cell.metadata.get("tags", [])) for cell in notebook.cells]
