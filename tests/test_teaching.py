"""The teachers' page: its links lead somewhere, its sections are the notebooks', its plans fill the class, and the
numbers that need no training are those that the library computes."""

import re
from pathlib import Path

import pytest

from lrm_recall.teach import head_merging as maths
from lrm_recall.teach.alpha_forgetting import forget
from lrm_recall.workbook import Workbook

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "teaching.md").read_text()
PLANS = {"11_walkthrough_alpha_mixing": "## 11: α-mixing", "12_walkthrough_head_merging": "## 12: Head merging"}


def plan_of(name: str) -> list[list[str]]:
    """The rows of a notebook's lesson plan: minutes of 45, minutes of 90, sections, what to do."""
    table = PAGE.partition(PLANS[name])[2].partition("### Plan\n")[2].partition("###")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()
            if re.match(r"\| [\d–]", line) and "45 min" not in line]


def test_links_exist():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert targets and [target for target in targets if not (ROOT / "docs" / target).exists()] == []


@pytest.mark.parametrize("name", PLANS)
def test_plans_fill_the_class_and_name_sections_of_the_notebook(name):
    plan = plan_of(name)
    for column, length in enumerate((45, 90)):
        assert sum(int(row[column]) for row in plan if row[column] != "–") == length
    cells = [cell.source for cell in Workbook(ROOT).read(name).cells if cell.cell_type == "markdown"]
    headings = [line[3:] for source in cells for line in source.splitlines() if line.startswith("## ")]
    for row in plan:
        for section in re.split(r", (?=\d)", row[2]):
            assert any(heading.startswith(section) for heading in headings), section


def test_numbers_without_training_are_the_librarys():
    plain, fading = forget().errors, forget(decay=0.9).errors
    errors = maths.compare_controls((16, 32), 4, 16)
    assert int((plain > 1).argmax()) + 1 == 18 and "after 18 it is above 1" in PAGE
    shown = {"the error is {}": plain[7], "error {} at decay 0.9": fading[-1], "against {} without": plain[-1],
             "Neither: {} and": errors["masked"], "and {} lost, merging": errors["copied"],
             "merging {}.": errors["merged"]}
    for sentence, number in shown.items():
        assert sentence.format(f"{number:.2f}") in " ".join(PAGE.split()), sentence
    for heads, limit in ((4, "0.75"), (2, "0.50"), (1, "0")):
        assert f"{maths.error_limit(16, 16 // heads):g}" == f"{float(limit):g}" and limit in PAGE
