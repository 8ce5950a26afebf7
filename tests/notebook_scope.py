"""A notebook's own names, without what takes long: for tests that ask what its profiles would run."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lrm_recall.parameters import declared_parameters
from lrm_recall.workbook import Workbook

PROFILES = ("smoke", "laptop", "h100", "paper")
WORKBOOK = Workbook(Path(__file__).resolve().parents[1])


@cache
def scope_of(name: str, profile: str, last: str, wanted: Callable[[str], bool] = lambda source: True) -> dict[str, Any]:
    """The names that a notebook has defined once the variable `last` is, with a profile's values, as on a CPU.

    Args:
        wanted: which of the cells up to there to run, by their source; those that import always run.
    """
    notebook = WORKBOOK.read(name)
    declared = declared_parameters(notebook, name)
    scope = {parameter: declared[parameter].default for parameter in declared}
    scope |= WORKBOOK.values(name, profile, declared) | {"profile": profile, "device": "cpu"}
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"][1:]  # the first has the parameters
    until = next(index for index, source in enumerate(code) if re.search(rf"^{last} =", source, re.MULTILINE))
    for source in code[: until + 1]:
        if wanted(source) or "import " in source:
            exec(compile(source, name, "exec"), scope)
    return scope
