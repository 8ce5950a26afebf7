"""What reproduced, in one table: the verdicts in the tables of all notebooks, scale by scale.

Read from the CSV files that the notebooks leave beside their figures, outputs/<profile>/<name>.csv.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lrm_recall.figures.verdicts import NOT_RUN, VERDICTS
from lrm_recall.paper import paper_tables

# File of a notebook: the paper's table, and what its numbers are
_TABLES = {
    "mqar_table11": ("resona", 11, "recall of keys and values (MQAR)"),
    "mad_table1": ("resona", 1, "the tasks of MAD"),
    "lm_table2": ("resona", 2, "perplexity"),
    "lm_table8": ("resona", 8, "zero-shot tasks"),
    "efficiency_table5": ("resona", 5, "time to read a prompt"),
    "efficiency_table6": ("resona", 6, "time for 128 tokens after it"),
    "efficiency_table7": ("resona", 7, "memory for it"),
}
_SCALES = ("paper", "h100", "wikipedia", "laptop")  # the largest first; others behind them
_NAMES = {"resona": "Resona", "statex": "StateX"}
_PAPER = ("paper", "paper_ppl")  # columns with the printed value, empty where the paper prints none
NO_VERDICT = "no verdict"


def summary(outputs: Path, passing: str = "smoke") -> pd.DataFrame:
    """A line for each of the papers' tables and each profile in which some of its cells ran.

    Args:
        outputs: the folder of the profiles' folders. passing: the profile whose results are not kept.

    Returns:
        table, numbers (what they are), profile, cells (that the paper prints), one column a verdict, and no verdict:
        the perplexity of a base model at another scale than the paper's is no claim.

    Raises:
        ValueError: a file that is no such table.
    """
    found = {folder.name for folder in outputs.iterdir() if folder.is_dir()} - {passing, "results"}
    profiles = [name for name in _SCALES if name in found] + sorted(found - set(_SCALES))
    lines = []
    for name, (paper, number, numbers) in _TABLES.items():
        for profile in profiles:
            file = outputs / profile / f"{name}.csv"
            if not file.is_file():
                continue
            given = _verdicts(file)
            counts = {verdict: int((given == verdict).sum()) for verdict in VERDICTS}
            if counts[NOT_RUN] < len(given):
                lines.append({"table": f"{_NAMES[paper]}, {number}", "numbers": numbers, "profile": profile,
                              "cells": len(given), **counts, NO_VERDICT: int(given.isna().sum())})
    return pd.DataFrame(lines, columns=["table", "numbers", "profile", "cells", *VERDICTS, NO_VERDICT])


def tables_not_run(table: pd.DataFrame) -> str:
    """The papers' tables that have no line in `summary`: "Resona 3, 4; StateX 2"."""
    ran = set(table["table"])
    missing = {paper: [number for number in numbers if f"{_NAMES[paper]}, {number}" not in ran]
               for paper, numbers in paper_tables().items()}  # fmt: skip
    return "; ".join(f"{_NAMES[paper]} {', '.join(map(str, numbers))}" for paper, numbers in missing.items() if numbers)


def _verdicts(file: Path) -> pd.Series:
    """The verdict of each of the paper's cells in a table's file, NaN where it has none."""
    try:
        cells = pd.read_csv(file)
    except pd.errors.EmptyDataError:  # a table without lines
        return pd.Series(dtype=object)
    printed = [column for column in _PAPER if column in cells]
    if not printed or "verdict" not in cells:
        raise ValueError(f"{file} is no table with the paper's values and verdicts")
    return cells.loc[cells[printed[0]].notna(), "verdict"]
