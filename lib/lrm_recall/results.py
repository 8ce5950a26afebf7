"""The store of results: one JSON Lines file, one row a line, only ever appended to.

What it promises: when `append` returns, the row is on disk, whole, whatever happens next (`kill -9` included)
and however many threads and processes write at once. A kill in the middle of a write leaves a torn last line
without a newline; that row was never reported as stored, and the next writer moves it to `<file>.torn`.
Anything else that is not a row is somebody's mistake (an edit, a merge conflict, another program's file): one
error with the line number, and nothing is written.

Files are named outputs/results/<group>.<profile>.jsonl, for example synthetic.laptop.jsonl.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lrm_recall.rows import FIELDS, Row, make_row, newest, plain, row_problem, run_key

if TYPE_CHECKING:
    import pandas as pd  # imported where a table is made: sweeps and the command line do without

__all__ = [
    "Merge",
    "ResultStore",
    "StoreError",
    "frame",
    "load_profiles",
    "make_row",
    "merge_rows",
    "profile_path",
    "run_key",
]

_LINE_START = b'{"key":"'  # how every line of ours begins, so that a torn one is told from a foreign one


class StoreError(ValueError):
    """A file of results that cannot be read: names the file, the line and what is wrong with it."""


class Merge(NamedTuple):
    """How many rows a merge took in under a new key, how many in place of an older or failed row, how many not."""

    added: int
    replaced: int
    kept: int


class ResultStore:
    """Rows of results in one file. Safe to share between threads, and to open in any number of processes.

    The rows that it returns are its own: copy one before changing it.

    Args:
        path: the .jsonl file; it and its folder are made by the first append.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._guard = threading.Lock()  # of the two fields below
        self._seen = b""  # the lines already parsed: appends leave them as they are, so only the rest is read
        self._rows: list[Row] = []

    def __repr__(self) -> str:
        return f"ResultStore({str(self.path)!r})"

    def rows(self) -> list[Row]:
        """The rows that count as stored: of each key the last that succeeded, in their order."""
        return [row for row in self._latest().values() if row["status"] == "ok"]

    def failures(self) -> list[Row]:
        """The last row of each key that has failed and never succeeded."""
        return [row for row in self._latest().values() if row["status"] == "failed"]

    def get(self, key: str) -> Row | None:
        """The stored row of `key`; None when there is none, or only failures."""
        row = self._latest().get(key)
        return row if row is not None and row["status"] == "ok" else None

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not stored (failed ones included), each once, in the given order."""
        latest = self._latest()
        return [k for k in dict.fromkeys(keys) if k not in latest or latest[k]["status"] != "ok"]

    def frame(self) -> pd.DataFrame:
        """`rows()` as a table; see `frame`."""
        return frame(self.rows())

    def append(self, row: Row) -> None:
        """Store `row`: on return it is on disk.

        Raises:
            ValueError: when `row` is not valid, or its key does not belong to its content.
            StoreError: when the file holds a line that is not a row. In both cases nothing is written.
            OSError: when the file cannot be written, as on a full disk; it is left as it was.
        """
        line = _line(row)
        with self._open_to_write() as file:
            self._write(file, line)

    def merge(self, rows: Iterable[Row]) -> Merge:
        """Take in the rows of other stores: on return they are on disk, all of them or, on an error, none.

        Of two rows of one key the newer successful one counts (by `created`), then the newer failed one. A row that
        does not count is not taken in, so merging the same rows again changes nothing. Rows of other sweeps that
        arrive meanwhile wait for the merge.

        Raises:
            ValueError, StoreError, OSError: as `append`.
        """
        offered = _by_age(rows)
        lines = {key: _line(row) for key, row in offered.items()}
        with self._open_to_write() as file:
            here = newest(self._read(file)[0])
            taken = {key for key, row in offered.items() if key not in here or _counts(row, here[key])}
            if taken:
                self._write(file, b"".join(line for key, line in lines.items() if key in taken))
        return Merge(added=len(taken - here.keys()), replaced=len(taken & here.keys()),
                     kept=len(offered.keys() - taken))

    def repair(self) -> None:
        """Check every line, and move a torn last line away; `append` does the same before it writes.

        Raises:
            StoreError: when the file holds a line that is not a row.
        """
        if self.path.exists():
            with self._open(os.O_RDWR | os.O_APPEND, fcntl.LOCK_EX) as file:
                self._repair(file)

    def _latest(self) -> dict[str, Row]:
        if not self.path.exists():
            return {}
        with self._open(os.O_RDONLY, fcntl.LOCK_SH) as file:
            return newest(self._read(file)[0])

    @contextlib.contextmanager
    def _open(self, flags: int, lock: int) -> Iterator[int]:
        """A fresh file descriptor under a lock: flock belongs to the descriptor, so it parts threads too."""
        file = os.open(self.path, flags, 0o644)
        try:
            fcntl.flock(file, lock)
            yield file
        finally:
            os.close(file)  # releases the lock, as does the death of the process

    @contextlib.contextmanager
    def _open_to_write(self) -> Iterator[int]:
        """The file under the exclusive lock, made if need be, every line of it a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as file:
            self._repair(file)
            yield file

    def _write(self, file: int, lines: bytes) -> None:
        """Append whole lines: on return they are on disk, on an error the file is as it was."""
        size = os.fstat(file).st_size
        try:
            if (written := os.write(file, lines)) != len(lines):
                raise OSError(errno.ENOSPC, f"only {written} of {len(lines)} bytes fit on the disk", str(self.path))
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
        if size == 0:
            _sync_folder(self.path.parent)

    def _read(self, file: int) -> tuple[list[Row], bytes]:
        """All rows, and the torn last line (empty when there is none)."""
        data = _read_all(file)
        with self._guard:
            if not data.startswith(self._seen):
                self._seen, self._rows = b"", []
            *lines, tail = data[len(self._seen) :].split(b"\n")
            first = len(self._rows) + 1
            rows = self._rows + [self._parse(line, first + index) for index, line in enumerate(lines)]
            self._seen, self._rows = data[: len(data) - len(tail)], rows
        if not tail:
            return rows, b""
        if _is_whole(tail):  # an editor took the last newline away, or a kill came one byte early
            return [*rows, self._parse(tail, len(rows) + 1)], b""
        if not (tail.startswith(_LINE_START) or _LINE_START.startswith(tail)):
            self._parse(tail, len(rows) + 1)  # raises: no row of ours, so not ours to move
        return rows, tail

    def _repair(self, file: int) -> None:
        """Leave the file empty or ending in a newline, every line a row. Needs the exclusive lock."""
        _, torn = self._read(file)
        size = os.fstat(file).st_size
        if torn:
            aside = self.path.with_name(self.path.name + ".torn")
            with aside.open("ab") as keep:
                keep.write(torn + b"\n")
                keep.flush()
                os.fsync(keep.fileno())
            os.ftruncate(file, size - len(torn))
            warnings.warn(
                f"{self.path}: the last line was cut off in the middle of a write; its {len(torn)} bytes are "
                f"now in {aside.name}, and that run counts as missing",
                stacklevel=4,
            )
        elif size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")

    def _parse(self, line: bytes, number: int) -> Row:
        try:
            row = json.loads(line)
        except ValueError:  # broken JSON, or bytes that are not UTF-8
            raise StoreError(f"{self.path}: line {number} is not JSON: {_shown(line)}") from None
        if problem := row_problem(row):
            raise StoreError(f"{self.path}: line {number} is not a row of results: {problem}")
        return row


def _line(row: Row) -> bytes:
    """A row as the line that is stored.

    Raises:
        ValueError: when `row` is not valid, or its key does not belong to its content.
    """
    if problem := row_problem(row):
        raise ValueError(f"not a valid row: {problem}")
    key = run_key(row["experiment"], row["config"], row["seed"], row["data"]["revision"], row["code"])
    if row["key"] != key:
        raise ValueError(f"the row's key is {row['key']}, but its content has the key {key}")
    content = {name: plain(row[name], name) for name in FIELDS}  # the key first, as in _LINE_START
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _by_age(rows: Iterable[Row]) -> dict[str, Row]:
    """The row that counts of each key, whatever order they come in."""
    return newest(sorted(rows, key=lambda row: datetime.fromisoformat(row["created"])))


def _counts(row: Row, other: Row) -> bool:
    """Whether `row` counts where `other`, of the same key, is stored already."""
    return row != other and _by_age([other, row])[row["key"]] is row


def _is_whole(line: bytes) -> bool:
    """Whether `line` is complete JSON: a cut row never is, because its last byte is the closing brace."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def merge_rows(*sources: Iterable[Row]) -> list[Row]:
    """Rows of several stores as one list, the last of each key; a failure never replaces a success."""
    return list(newest(row for source in sources for row in source).values())


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table: one column a field, nested fields by their path (`config.mixer`, `metrics.accuracy`,
    `config.resona.top_k`, `machine.cpu`). Lists inside `config` become tuples, so that one can group by them;
    `history` stays one list a row."""
    import pandas as pd

    return pd.DataFrame([dict(_flatten(row)) for row in rows])


def profile_path(results_dir: str | os.PathLike[str], group: str, profile: str) -> Path:
    """Where the rows of an experiment group are for one profile: <results_dir>/<group>.<profile>.jsonl."""
    return Path(results_dir) / f"{group}.{profile}.jsonl"


def load_profiles(results_dir: str | os.PathLike[str], group: str) -> pd.DataFrame:
    """The stored rows of every profile of `group` in one table (see `frame`), sorted by profile.

    Of rows that differ in nothing but their code or data revision the last counts: an old result must not be
    averaged with the new one as if it were another seed.

    The column `profile` is the profile whose file holds the row. With no file at all the table is empty and
    has that column alone.
    """
    import pandas as pd

    tables = []
    for path in sorted(profile_path(results_dir, group, "x").parent.glob(f"{group}.*.jsonl")):
        profile = path.name.removeprefix(f"{group}.").removesuffix(".jsonl")
        tables.append(frame(_current(ResultStore(path).rows())).assign(profile=profile))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"profile": pd.Series(dtype=str)})


def _current(rows: Iterable[Row]) -> list[Row]:
    """Of rows with the same experiment, config and seed only the last."""
    by_content = {run_key(row["experiment"], row["config"], row["seed"], "", ""): row for row in rows}
    return list(by_content.values())


def _flatten(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{path}{name}.")
        else:
            yield path + name, _tuples(item) if path.startswith("config.") else item


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _read_all(file: int) -> bytes:
    parts, position = [], 0
    while part := os.pread(file, 1 << 24, position):
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def _sync_folder(folder: Path) -> None:
    """A new file's name is on disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")
