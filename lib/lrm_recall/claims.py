"""Which runs of a store are being done at this moment, so that two sweeps on one store do none of them twice.

A claim is a lock on a small file, <store>.claims/<key>. The kernel drops the lock when the process ends, however that
happens, so a claim never outlives its sweep; a file that a kill leaves behind claims nothing. Like the store itself
this parts threads, processes, and machines that share a file system with locks. Machines that share nothing
divide the runs beforehand (`lrm_recall.sweep.shard_of`) and merge their rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path


class Claims:
    """The claims of one sweep.

    Args:
        store: the store's file; the folder of claims stands beside it while there are any.
    """

    def __init__(self, store: Path):
        self._folder = store.with_name(store.name + ".claims")
        self._held: dict[str, int] = {}  # key -> file descriptor that holds the lock

    def take(self, key: str) -> bool:
        """Claim the run `key`; False when another sweep has it."""
        while True:
            with contextlib.suppress(FileExistsError):  # another's, removed while mkdir looked what it was
                self._folder.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self._folder / key, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the last claim's sweep has just removed the folder
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            if os.fstat(file).st_nlink:
                self._held[key] = file
                return True
            os.close(file)  # released, and so removed, between the two calls: its lock would keep nobody away

    def release(self, key: str) -> None:
        """Give the run `key` back, its row stored or not."""
        (self._folder / key).unlink(missing_ok=True)  # before the lock goes: whoever gets it sees that the file is gone
        os.close(self._held.pop(key))

    def close(self) -> None:
        """Give everything back."""
        for key in list(self._held):
            self.release(key)
        with contextlib.suppress(OSError):  # not there, or in use by another sweep
            self._folder.rmdir()
