"""The numbers that the papers print: values.csv, read and with its conditions taken apart.

values.csv holds every number of the tables of Resona and StateX, one a line, with the condition it was
measured under as one string ("L=64;d_model=32", "prefill=128k", "context=16K;MV", "ARC-C"). Figures and tables
compare with these numbers; nothing else in the library has a paper's result written into it.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

import pandas as pd

_COLUMNS = ["paper", "table", "model", "variant", "condition", "metric", "value", "unit"]
_INTEGER = re.compile(r"(\d+)([kK]?)")


def paper_values(paper: str, table: int) -> pd.DataFrame:
    """The values of one table of one paper.

    Args:
        paper: "resona" or "statex".
        table: its number in that paper.

    Returns:
        One row a number: model, variant, metric, value (float), unit, and one column for each name of the
        conditions ("L", "d_model", "context" ...). Whole numbers are int64, "128k" being 128 * 1024; a part
        of a condition without a name ("ARC-C") is in the column "task".

    Raises:
        ValueError: no such paper or table; the message lists what there is.
    """
    known, values = paper_tables(), _all_values()
    _check("paper", paper, list(known))
    _check(f"table of {paper}", table, known[paper])
    rows = values[(values["paper"] == paper) & (values["table"] == table)].reset_index(drop=True)
    conditions = pd.DataFrame([parse_condition(text) for text in rows["condition"]], index=rows.index)
    return pd.concat([rows.drop(columns=["paper", "table", "condition"]), conditions], axis=1)


def paper_tables() -> dict[str, list[int]]:
    """The numbers of the tables of each paper."""
    values = _all_values()
    return {str(paper): sorted(map(int, part["table"].unique())) for paper, part in values.groupby("paper")}


def parse_condition(text: str) -> dict[str, int | str]:
    """Take a condition apart: "L=64;d_model=32" to {"L": 64, "d_model": 32}, "ARC-C" to {"task": "ARC-C"}."""
    condition: dict[str, int | str] = {}
    for part in filter(None, text.split(";")):
        name, _, value = part.rpartition("=")
        condition[name or "task"] = _number(value)
    return condition


def _number(text: str) -> int | str:
    """An int where the text is a whole number, perhaps of thousands of tokens; otherwise the text itself."""
    match = _INTEGER.fullmatch(text)
    return text if match is None else int(match[1]) * (1024 if match[2] else 1)


def _check(what: str, value: object, allowed: list) -> None:
    if value not in allowed:
        raise ValueError(f"no {what} {value!r}; there are: {', '.join(map(str, allowed))}")


@cache
def _all_values() -> pd.DataFrame:
    """values.csv as it is, its columns checked; the condition is text, empty where the paper gives none."""
    with resources.files(__name__).joinpath("values.csv").open(encoding="utf-8") as file:
        values = pd.read_csv(file, keep_default_na=False, dtype={"condition": str, "unit": str})
    if list(values.columns) != _COLUMNS:
        raise ValueError(f"values.csv must have the columns {', '.join(_COLUMNS)}, it has "
                         f"{', '.join(values.columns)}")
    return values
