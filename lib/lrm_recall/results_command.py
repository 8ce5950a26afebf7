"""`lrm-recall results`: rows of machines that share nothing into one file; what reproduced, in one table.

    lrm-recall results merge a/synthetic.paper.jsonl b/synthetic.paper.jsonl     into outputs/results
    lrm-recall results summary                                                   outputs/summary.md, and shown
    lrm-recall results same-code outputs/results/language_model.laptop.jsonl     after a change that changes no result

Of rows with the same key the newest successful one counts, then the newest failed one. Merging twice changes nothing,
and a sweep may go on meanwhile. The summary counts the verdicts in the tables that the notebooks have left in outputs/.
`same-code` does some of the runs of a file again, half an hour on two cores (`lrm_recall.same_code`).

Exit code 0: done; 1: the file could not be written and is as it was, or runs done again differ; 2: a mistake in what
was asked, or a file that is not one of rows; nothing has been done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrm_recall.parameters import ParameterError
from lrm_recall.results import Merge, ResultStore, StoreError
from lrm_recall.rows import Row

if TYPE_CHECKING:
    from lrm_recall.workbook import Workbook


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `results` to the command line."""
    results = commands.add_parser("results", help="work on stored rows")
    actions = results.add_subparsers(required=True, metavar="action")
    merge = actions.add_parser("merge", help="take in the rows of other machines")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rows, such as a/synthetic.paper.jsonl")
    merge.add_argument("--into", type=Path, metavar="FILE", help="default: the file of that name in outputs/results")
    merge.set_defaults(command=_merge)
    actions.add_parser("summary", help="count the verdicts of all notebooks' tables").set_defaults(command=_summary)
    same = actions.add_parser("same-code", help="show that code was changed without changing results")
    same.add_argument("file", type=Path, metavar="FILE", help="rows of language models, computed on such a machine")
    same.set_defaults(command=_same_code)


def _summary(workbook: Workbook, options: argparse.Namespace) -> int:
    from lrm_recall.figures.summary import summary, tables_not_run
    from lrm_recall.figures.tables import markdown

    outputs = workbook.root / "outputs"
    try:
        table = summary(outputs) if outputs.is_dir() else None
    except ValueError as error:
        raise ParameterError([str(error)]) from None
    if table is None or table.empty:
        raise ParameterError([f"{outputs} has no table of a notebook yet, but for those of the profile smoke"])
    text = f"{markdown(table)}\n\nNot run yet: {tables_not_run(table)}."
    (outputs / "summary.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _merge(workbook: Workbook, options: argparse.Namespace) -> int:
    names = {path.name for path in options.files}
    if options.into is None and len(names) > 1:
        raise ParameterError([f"rows of {', '.join(sorted(names))} belong into different files; name one with --into"])
    for path in options.files:
        if not path.is_file():
            raise ParameterError([f"there is no file {path}"])
    into = options.into or workbook.root / "outputs" / "results" / names.pop()
    stores = [ResultStore(path) for path in options.files]
    try:
        rows = [row for store in stores for row in (*store.failures(), *store.rows())]
        _check_profiles(rows, into)
        merge = ResultStore(into).merge(rows)
    except StoreError as error:
        raise ParameterError([str(error)]) from None
    except OSError as error:
        print(f"lrm-recall: {error}; {into} is as it was", file=sys.stderr)
        return 1
    print(f"{into}: {_merged(merge)}")
    return 0


def _same_code(workbook: Workbook, options: argparse.Namespace) -> int:
    from lrm_recall.same_code import show_same
    from lrm_recall.train.language_model import EXPERIMENT

    if not options.file.is_file():
        raise ParameterError([f"there is no file {options.file}"])
    try:
        rows = ResultStore(options.file).rows()
    except StoreError as error:
        raise ParameterError([str(error)]) from None
    if strange := sorted({row["experiment"] for row in rows} - {EXPERIMENT}):
        raise ParameterError([f"{options.file} has rows of {', '.join(strange)}; only {EXPERIMENT} can be done again"])
    if gpus := sorted({device for row in rows if (device := row["machine"].get("device", "cpu")) != "cpu"}):
        raise ParameterError([f"{options.file} has rows of {', '.join(gpus)}; runs are done again on a CPU, as the "
                              "rows of profile laptop were"])
    return 0 if show_same(rows, lambda text: print(text, flush=True)) else 1


def _check_profiles(rows: Sequence[Row], into: Path) -> None:
    """Refuse rows of another profile than `into` is named after: tables take a row's scale from its file.

    Raises:
        ParameterError: there are such rows. A file that is not called <group>.<profile>.jsonl takes all.
    """
    group, _, profile = into.name.removesuffix(".jsonl").partition(".")
    strange = sorted({row["profile"] for row in rows} - {profile})
    if into.suffix == ".jsonl" and profile and strange:
        files = ", ".join(f"{group}.{each}.jsonl" for each in strange)
        raise ParameterError([f"rows of profile {', '.join(strange)} do not belong into {into}, but into {files}"])


def _merged(merge: Merge) -> str:
    return (f"{merge.added} rows of new keys, {merge.replaced} in place of an older or failed row of their key, "
            f"{merge.kept} not needed: the newest successful row of a key counts")
