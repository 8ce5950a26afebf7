"""Rows that outlive a change of their code: stored runs done again, to the last digit, by the code as it is now.

    lrm-recall results same-code outputs/results/language_model.laptop.jsonl

A row is valid as long as its code stands, and code stands still only as long as it is not made better. Where a change
cannot change results (an option that these runs do not use, another way to launch the same kernels), some of the rows
are computed again here: for each code that a file names, the cheapest row of every kind of run. Where all that they
measured is equal, times apart, `lib/lrm_recall/same_code.json` gives the new code the name of the old, so that every
row of the old counts on, on whatever device it was computed: kernels, which a name leaves out, have tests of their own.
One digit off, and the new code keeps its own name.

It needs the kind of CPU that computed the rows. The file is committed with the change, for a reader to judge both:
equal runs are evidence, not a proof.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lrm_recall import code_hash as codes
from lrm_recall.code_hash import code_hash, same_code, source_hash
from lrm_recall.data.store import VARIABLE, cache_root
from lrm_recall.rows import Row, plain
from lrm_recall.train.language_model import LMRun, code_modules, run_lm

_TIMES = ("tokens_per_s", "mfu", "seconds")  # of metrics and of entries of the history
_KIND = ("chunks", "packed", "accumulation")  # of a run: its path through training, beside its mixer and Resona


def modules(row: Row) -> list[str]:
    """What decided the result of a row."""
    return code_modules(LMRun(**row["config"]))


def stale(rows: Iterable[Row]) -> list[Row]:
    """The rows whose code is no longer the one that would compute them."""
    return [row for row in rows if row["code"] != code_hash(modules(row))]


def witnesses(rows: Iterable[Row]) -> list[Row]:
    """The cheapest row of every kind of run, for each code; the longest first."""
    cheapest: dict[tuple, Row] = {}
    for row in rows:
        config = row["config"]
        kind = (row["code"], config["resona"] is None, *(config[name] for name in _KIND))
        if kind not in cheapest or row["runtime_s"] < cheapest[kind]["runtime_s"]:
            cheapest[kind] = row
    return sorted(cheapest.values(), key=lambda row: -row["runtime_s"])


def differences(row: Row, metrics: dict[str, Any], history: Sequence[dict[str, Any]]) -> list[str]:
    """Where a run that was done again is not equal to its row, times apart."""
    old, new = (_timeless(plain(value)) for value in (row["metrics"], metrics))
    found = [f"metrics.{name}: {old.get(name)!r:.60} in the row, {new.get(name)!r:.60} now"
             for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return found + ["history"] * (_timeless(plain(row["history"])) != _timeless(plain(history)))


def show_same(rows: Sequence[Row], say: Callable[[str], None], workers: int | None = None) -> bool:
    """Do witnesses again, and write down which codes they show to be the same; whether no row is stale then.

    Args:
        rows: rows of language models, computed on this kind of machine.
        say: told about each run.
        workers: how many run at a time; by default as many as there are cores.
    """
    chosen = witnesses(stale(rows))
    names = {row["code"]: source_hash(modules(row)) for row in chosen}  # before it may change
    current = {source_hash(modules(row)) for row in rows}
    problems: dict[str, list[str]] = {code: [] for code in names}
    workers = min(workers or os.cpu_count() or 1, max(1, len(chosen)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for row, found in zip(chosen, pool.map(_again, chosen), strict=True):
            problems[row["code"]] += found
            config = row["config"]
            say(f"{row['key']} {config['mixer']} {config['variant']}: {'; '.join(found) or 'equal'}")
    of_file = {row["code"] for row in rows}
    kept = {new: entry for new, entry in same_code().items() if entry["as"] not in of_file or new in current}
    count = Counter(row["code"] for row in rows)
    for code in sorted((code for code, found in problems.items() if not found), key=count.__getitem__):
        # of two old codes, the one with more rows; the rows of the other stay stale
        kept[names[code]] = {"as": code, "rows": sorted(row["key"] for row in chosen if row["code"] == code)}
    if kept != same_code():
        write(kept)
    return not stale(rows)


def write(entries: dict[str, dict[str, Any]]) -> None:
    """Write `same_code.json` anew, whole or not at all."""
    partial = codes.SAME_CODE.with_suffix(".partial")
    partial.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n", encoding="utf-8")
    partial.replace(codes.SAME_CODE)
    same_code.cache_clear()


def _timeless(value: Any) -> Any:
    """`value` without the times in it."""
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if name not in _TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _again(row: Row) -> list[str]:
    """Train the run of a row from its start; how its result differs, or why there is none."""
    try:
        with _scratch():
            result = run_lm(LMRun(**row["config"]))
    except Exception as error:  # the others are worth knowing about
        return [f"{type(error).__name__}: {error}"]
    return differences(row, result["metrics"], result["history"])


@contextmanager
def _scratch() -> Iterator[None]:
    """A cache with the corpora of the real one, and checkpoints and models of its own, which go."""
    real = cache_root()
    real.mkdir(parents=True, exist_ok=True)
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory(prefix="same-code-", dir=real) as folder:
        for entry in real.iterdir():
            if entry.name not in ("checkpoints", "models") and not entry.name.startswith("same-code-"):
                Path(folder, entry.name).symlink_to(entry.resolve())
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
