"""What the README and docs/ say is true: links lead somewhere, code runs, tables are those of the stored rows."""

import json
import re
from pathlib import Path

import pytest

from lrm_recall.figures.mqar_table11 import mqar_table11, results_table_markdown
from lrm_recall.figures.summary import summary, tables_not_run
from lrm_recall.figures.tables import markdown
from lrm_recall.figures.verdicts import VERDICTS
from lrm_recall.results import ResultStore, load_profiles

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COPIES = [(page, name) for page in PAGES for name in re.findall(r"<!-- (outputs/\S+\.md) -->", page.read_text())]
RESONA = {"chunk_size": 2, "top_k": 1, "encoder": "place", "gate": "null_chunk", "alpha": 0.5, "num_heads": 1,
          "memory_norm": True}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text())
    assert targets
    for target, _, anchor in (target.partition("#") for target in targets):
        place = page.parent / target if target else page
        assert place.exists(), target
        headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["y"].shape == (2, 32, 64)
    assert namespace["tokens"].shape == (1, 48)
    assert namespace["expanded"].state_size() > namespace["model"].state_size()


@pytest.mark.parametrize(("page", "name"), COPIES, ids=[name for _, name in COPIES])
def test_tables_are_copies_of_the_outputs(page, name):
    begin, _, rest = page.read_text().partition(f"<!-- {name} -->\n")
    assert rest.partition("<!-- end -->")[0].strip() == (ROOT / name).read_text().strip()


def test_the_summary_counts_the_tables_that_are_there():
    table = summary(ROOT / "outputs")
    text = (ROOT / "outputs" / "summary.md").read_text()
    assert text.startswith(markdown(table)) and text.strip().endswith(f"Not run yet: {tables_not_run(table)}.")
    for line in table.to_dict("records"):  # as the tables say of themselves
        number = int(line["table"].split()[-1])
        names = {11: "mqar_table11", 1: "mad_table1", 2: "lm_table2", 8: "lm_table8"}
        file = names.get(number, f"efficiency_table{number}")
        counts = ", ".join(f"{line[verdict]} {verdict}" for verdict in VERDICTS)
        shown = (ROOT / "outputs" / line["profile"] / f"{file}.md").read_text()
        assert re.search(rf"Of the {line['cells']} \w+ of Table {number}: {counts}", shown), (line, shown[-200:])


@pytest.mark.parametrize("profile", ["laptop", "paper"])
def test_table_11_comes_from_the_stored_rows(profile):
    rows = load_profiles(ROOT / "outputs" / "results", "synthetic")
    table = results_table_markdown(mqar_table11(rows, profile, RESONA))
    assert (ROOT / "outputs" / profile / "mqar_table11.md").read_text().strip() == table.strip()


def test_every_time_of_the_benchmark_table_is_in_a_row():
    section = README.partition("## Speed on a CPU")[2].partition("\n## ")[0]
    shown = {float(number) for line in section.splitlines() if line.startswith("| ")
             for number in re.findall(r"(?<![\w.×])(\d+(?:\.\d+)?)(?= ms)", line)}
    rows = ResultStore(ROOT / "outputs" / "results" / "bench.laptop.jsonl").rows()
    stored = {float(f"{value:.3g}") for row in rows for value in row["metrics"].values()}
    assert shown and shown <= stored, json.dumps(sorted(shown - stored))


def test_committed_rows_are_whole_and_made_by_known_code():
    rows = [row for path in (ROOT / "outputs" / "results").glob("*.laptop.jsonl") for row in ResultStore(path).rows()]
    assert rows
    for row in rows:
        assert row["machine"]["torch"] and row["machine"]["cpu"] and re.fullmatch(r"[0-9a-f]{16}", row["code"])
