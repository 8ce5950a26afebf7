"""Tables for files and for readers: CSV and markdown beside each other, mean and spread in one cell."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

NOTHING = "–"


def mean_sd(mean: float | None, sd: float | None, seeds: int) -> str:
    """"0.987 ± 0.004" over several seeds, "0.987" for one, a dash for none."""
    if pd.isna(mean):
        return NOTHING
    return f"{mean:.3f} ± {sd:.3f}" if seeds > 1 else f"{mean:.3f}"


def markdown(table: pd.DataFrame) -> str:
    """A GitHub table: numbers to the right, missing values as a dash."""
    headers = [str(name) for name in table.columns]
    rules = ["--:" if pd.api.types.is_numeric_dtype(table[name]) else "---" for name in table.columns]
    lines = [[_text(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headers, rules, *lines])


def write_table(
    table: pd.DataFrame, folder: str | os.PathLike[str], name: str, text: str | None = None
) -> list[Path]:
    """Write <name>.csv, every column as it is, and <name>.md (`text`, or the table itself); returns both."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.csv", folder / f"{name}.md"]
    table.to_csv(paths[0], index=False, lineterminator="\n")
    paths[1].write_text((markdown(table) if text is None else text) + "\n", encoding="utf-8")
    return paths


def _text(value: object) -> str:
    if pd.isna(value):
        return NOTHING
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
