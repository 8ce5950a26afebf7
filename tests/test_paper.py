"""The accessor of the papers' numbers: every table is reachable, conditions come back as typed columns."""

import csv
from collections import Counter
from pathlib import Path

import pytest

import lrm_recall.paper
from lrm_recall.paper import paper_values, parse_condition

CSV = Path(lrm_recall.paper.__file__).with_name("values.csv")


def _lines() -> list[dict[str, str]]:
    with CSV.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_number_is_reachable():
    lines = _lines()
    tables = Counter((line["paper"], int(line["table"])) for line in lines)
    found = {(paper, table): len(paper_values(paper, table)) for paper, table in tables}
    assert found == dict(tables)
    assert sum(found.values()) == len(lines) == 1100


def test_table_11_has_typed_conditions():
    values = paper_values("resona", 11)
    assert values[["L", "d_model"]].dtypes.tolist() == ["int64", "int64"]
    assert values["value"].dtype == "float64"
    cell = values.query("model == 'BaseConv' and variant == 'base' and L == 128 and d_model == 64")
    assert cell["value"].tolist() == [0.115]
    assert values.query("variant != 'base'")["value"].eq(1.0).all()


@pytest.mark.parametrize(("paper", "table", "query", "value"), [
    ("resona", 5, "model == 'Transformer' and prefill == 131072", 6094.0),
    ("resona", 9, "model == 'GLA' and variant == 'lr20x' and context == 16384 and task == 'MV'", 0.578),
    ("resona", 1, "model == 'Mamba2' and variant == 'resona' and task == 'Fuzzy ICR'", 62.9),
])
def test_values_as_printed(paper, table, query, value):
    assert paper_values(paper, table).query(query)["value"].tolist() == [value]


@pytest.mark.parametrize(("text", "condition"), [
    ("", {}),
    ("L=64;d_model=32", {"L": 64, "d_model": 32}),
    ("context=16K;NIAH-Single-2", {"context": 16384, "task": "NIAH-Single-2"}),
    ("WikiText-103", {"task": "WikiText-103"}),
])
def test_conditions(text, condition):
    assert parse_condition(text) == condition


def test_unknown_paper_and_table_name_what_there_is():
    with pytest.raises(ValueError, match=r"no paper 'zoology'; there are: resona, statex"):
        paper_values("zoology", 2)
    with pytest.raises(ValueError, match=r"no table of statex 11; there are: 2, 3, 4, 5"):
        paper_values("statex", 11)
