"""The cache on disk: one folder of ours, files checked by SHA-256, published whole or not at all.

A result is written into a folder beside its place and renamed when every byte is on disk; the rename is the only step
that others see. A lock (the kernel's, which a killed process loses) lets one process make a result while others wait
for it. What a killed one left is removed by the next that makes the same result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lrm_recall.data.errors import DataError

VARIABLE = "LRM_RECALL_CACHE"
_PARTIAL = ".partial"


def cache_root() -> Path:
    """The folder of the cache: $LRM_RECALL_CACHE, or lrm-recall in the user's cache folder."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lrm-recall"


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raise DataError unless the file has this SHA-256; `remedy` says what to do about it."""
    if not path.is_file():
        raise DataError(f"{path} is missing; {remedy}")
    if (found := sha256(path)) != expected:
        raise DataError(f"{path} has the wrong checksum: SHA-256 {found[:16]}..., not {expected[:16]}...; {remedy}")


@contextlib.contextmanager
def locked(place: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of one result; `waiting` is called once when another process holds it."""
    with _clear_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(place.with_name(place.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def published(place: Path) -> Iterator[Path]:
    """An empty folder to write a result into; it becomes `place` when the block ends, and nothing when it fails.

    The caller holds the lock of `place`.

    Raises:
        DataError: the disk is full, or cannot be written to for another reason.
    """
    partial = place.with_name(place.name + _PARTIAL)
    with _clear_errors(place):
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir()
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            old = place.with_name(place.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            if place.exists():  # made anew: readers keep the files that they have mapped
                place.rename(old)
            partial.rename(place)
            shutil.rmtree(old, ignore_errors=True)
            _sync(place.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _clear_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a network library, not of the disk
            raise
        raise DataError(f"cannot write {place}: {error.strerror or error}; nothing of it was kept. Free some space, or "
                        f"set {VARIABLE} to a folder with more") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
