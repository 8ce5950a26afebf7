"""docs/gpu.md shows the rows that were measured on a GPU, and links to what exists."""

import re
from pathlib import Path

import pytest

from lrm_recall.figures.gpu_tables import TABLES, fill, stored_rows

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "gpu.md").read_text()
ROWS = stored_rows(ROOT / "outputs" / "results")


def test_tables_are_drawn_from_the_rows():
    assert set(re.findall(r"<!-- table: ([a-z ]+) -->", PAGE)) == set(TABLES)
    assert fill(PAGE, ROWS) == PAGE


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_rows(name):
    assert len(TABLES[name](ROWS)) > 0


def test_a_pair_without_its_other_side_is_no_line():
    alone = [row for row in ROWS if row["config"].get("side") != "fla"]
    assert len(TABLES["models"](alone)) == 0 and len(TABLES["decoding"](alone)) == 0


def test_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
