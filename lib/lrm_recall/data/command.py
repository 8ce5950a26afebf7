"""`lrm-recall data prepare`, `list` and `verify`.

    lrm-recall data prepare wikitext103 -p source=offline      tokenise a corpus; options as in a parameter file
    lrm-recall data prepare params/smoke/02_wikitext_lm.yaml   the corpus that a parameter file names
    lrm-recall data list                                       known corpora, and what is prepared
    lrm-recall data verify                                     every prepared file against its SHA-256

Exit code 0: done; 1: the data cannot be had, or a file is damaged; 2: a mistake in what was asked, nothing was done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_recall.parameters import ParameterError, read_assignments, read_yaml

_KEY_HELP = "an option of the corpus, such as source=offline, max_articles=1000 or tokenizer=NAME"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `data` to the command line."""
    data = commands.add_parser("data", help="prepare, list and verify the corpora of real text")
    actions = data.add_subparsers(required=True, metavar="action")
    prepare = actions.add_parser("prepare", help="fetch and tokenise corpora; what is there stays")
    prepare.add_argument("corpora", nargs="+", metavar="CORPUS", help="a name of `list`, or a .yaml file with a corpus")
    prepare.add_argument("-p", dest="options", action="append", default=[], metavar="NAME=VALUE", help=_KEY_HELP)
    prepare.add_argument("--vocab-size", type=int, metavar="N", help="refuse a tokenizer with more than N tokens")
    prepare.add_argument("--fresh", action="store_true", help="make it again although it is there")
    prepare.set_defaults(command=_prepare)
    show = actions.add_parser("list", help="known corpora, and what is prepared")
    show.set_defaults(command=_list)
    verify = actions.add_parser("verify", help="check every prepared file against its SHA-256")
    verify.add_argument("corpora", nargs="*", metavar="CORPUS", help="default: all that are prepared")
    verify.set_defaults(command=_verify)


def _prepare(_: object, options: argparse.Namespace) -> int:
    from lrm_recall.data.corpora import read_corpus
    from lrm_recall.data.errors import DataError
    from lrm_recall.data.preparation import prepare

    given = read_assignments(options.options)
    try:
        corpora = [read_corpus(_values(word) | given) for word in options.corpora]
    except DataError as error:
        raise ParameterError([str(error)]) from None
    rows, failed = [], False
    for corpus in corpora:
        try:
            prepared = prepare(corpus, vocab_size=options.vocab_size, progress=True, fresh=options.fresh)
        except DataError as error:
            print(f"lrm-recall: {error}", file=sys.stderr)
            failed = True
        else:
            rows += _rows(prepared.manifest, prepared.path)
    _print_table(_COLUMNS, rows)
    return 1 if failed else 0


def _list(_: object, options: argparse.Namespace) -> int:
    from lrm_recall.data.corpora import CORPORA
    from lrm_recall.data.errors import DataError
    from lrm_recall.data.offline import PACKAGED
    from lrm_recall.data.prepared import folders, read_manifest
    from lrm_recall.data.store import cache_root

    rows = [
        (corpus.name, corpus.hub.label.removeprefix("hub:") if corpus.hub else "-",
         f"{corpus.offline} ({PACKAGED[corpus.offline].about})" if corpus.offline else "-")
        for corpus in CORPORA.values()
    ]  # fmt: skip
    _print_table(("corpus", "on the hub", "offline source"), rows)
    print(f"\nprepared, in {cache_root()}:")
    rows = []
    for path in folders():
        try:
            rows += _rows(read_manifest(path), path)
        except DataError as error:
            print(f"lrm-recall: {error}", file=sys.stderr)
    _print_table(_COLUMNS, rows)
    if not rows:
        print("nothing")
    return 0


def _verify(_: object, options: argparse.Namespace) -> int:
    from lrm_recall.data.errors import DataError
    from lrm_recall.data.prepared import Prepared, folders

    found = [path for path in folders() if not options.corpora or path.name.rpartition("-")[0] in options.corpora]
    missing = [name for name in options.corpora if name not in {path.name.rpartition("-")[0] for path in found}]
    problems = [f"{name} is not prepared" for name in missing]
    for path in found:
        try:
            Prepared(path)
        except DataError as error:
            problems.append(str(error))
        else:
            print(f"{path.name}: in order")
    for problem in problems:
        print(f"lrm-recall: {problem}", file=sys.stderr)
    if not problems and not found:
        print("nothing is prepared")
    return 1 if problems else 0


def _values(word: str) -> dict:
    """What a word of the command line names: a corpus, or a parameter file with one.

    Raises:
        ParameterError: the file is not there, or has no corpus.
    """
    if not word.endswith((".yaml", ".yml")):
        return {"name": word}
    if not Path(word).is_file():
        raise ParameterError([f"there is no file {word}"])
    values = read_yaml(Path(word), word).get("corpus")
    if isinstance(values, str):
        return {"name": values}
    if not isinstance(values, dict):
        raise ParameterError([f"{word}: has no corpus: a name, or a mapping with a name and options"])
    return values


_COLUMNS = ("corpus", "source", "split", "articles", "tokens", "words", "longest", "tokenizer", "folder")


def _rows(manifest: dict, path: Path) -> list[tuple]:
    return [
        (manifest["corpus"], manifest["source"], name, f"{split['articles']:,}", f"{split['tokens']:,}",
         f"{split['words']:,}", f"{split['longest']:,}", manifest["tokenizer"]["name"], path.name)
        for name, split in manifest["splits"].items()
    ]  # fmt: skip


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; numbers to the right."""
    if not rows:
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (
            cell.rjust(width) if rows[0][i][:1].isdigit() else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
