"""What a notebook promises to leave behind, and whether it did: an exit code of 0 is no proof.

A notebook calls `promise(store, keys, files)`. The promise travels in the cell's output, as a MIME type of
its own, so the executed notebook carries the list of what to check, and the runner needs no side channel.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lrm_recall.results import ResultStore

MIME = "application/vnd.lrm-recall.promise+json"


def promise(
    store: ResultStore | None = None, keys: Iterable[str] = (), files: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Promise that after the run `store` holds a successful row of each of `keys`, and that the run has made
    each of `files`. A notebook may call this as often as it likes.

    Raises:
        ValueError: when nothing is promised, or keys without their store.
    """
    if isinstance(keys, str) or isinstance(files, str):
        raise ValueError("keys and files are lists, not one text")
    keys, files = list(dict.fromkeys(keys)), [os.fspath(file) for file in files]
    if not keys and not files:
        raise ValueError("a promise of nothing: give keys, files or both")
    if keys and store is None:
        raise ValueError("keys are promised of a store: promise(store, keys)")
    from IPython.display import display

    content = {"store": str(store.path) if store is not None else None, "keys": keys, "files": files}
    text = f"promised: {len(keys)} rows{f' in {store.path}' if store is not None else ''}, {len(files)} files"
    display({MIME: content, "text/plain": text}, raw=True)


def promises_of(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All promises in the outputs of an executed notebook."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]


def broken_promises(notebook: Mapping[str, Any], root: Path, begun: datetime, fresh: bool) -> list[str]:
    """What an executed notebook has promised and not kept, one line each; one line when it promised nothing.

    Args:
        root: the folder that relative paths start from.
        begun: when the run began (with a time zone); files must be newer, and with `fresh` rows too.
    """
    promises = promises_of(notebook)
    if not promises:
        return ["it promises nothing, so nothing shows that it worked; call lrm_recall.promises.promise"]
    broken = []
    for each in promises:
        if each["keys"]:
            broken += _missing_rows(ResultStore(root / each["store"]), each["keys"], begun if fresh else None)
        for name in each["files"]:
            file = root / name
            if not file.is_file() or not file.stat().st_size:
                broken.append(f"{name} is promised but {'empty' if file.is_file() else 'not there'}")
            elif file.stat().st_mtime < begun.timestamp() - 1:  # some file systems count whole seconds
                broken.append(f"{name} is promised but older than this run")
    return broken


def _missing_rows(store: ResultStore, keys: list[str], newer_than: datetime | None) -> list[str]:
    stored = {row["key"]: row for row in store.rows()}
    reasons = {row["key"]: row["error"] for row in store.failures()}
    broken = []
    for key in keys:
        if key not in stored:
            why = f": the run failed: {reasons[key]}" if key in reasons else ""
            broken.append(f"row {key} is promised but not in {store.path}{why}")
        elif newer_than is not None and datetime.fromisoformat(stored[key]["created"]) < newer_than:
            broken.append(f"row {key} in {store.path} is older than this fresh run")
    return broken
