"""The progress bar of a sweep, with an estimate of the time left.

The estimate is (expected work of all runs) / (runs at a time) - (time gone). Expected work comes from the
cost hints, in seconds on whatever machine they were written for, scaled by how long the finished runs really
took; without hints every run counts the same, and there is no estimate until one has finished. Those that finish first
are the quick ones, which stop early, and runs may wait for each other: where the pace so far promises less than that,
the pace counts.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType

from tqdm import tqdm


class SweepProgress:
    """A bar that counts finished runs; a context manager.

    Args:
        title: what is being run.
        keys: the runs.
        cost: expected seconds of each run; None without hints.
        workers: how many run at a time.
        show: False to print nothing.
    """

    def __init__(
        self, title: str, keys: Iterable[str], cost: Mapping[str, float] | None, workers: int, show: bool
    ):
        self._cost = dict(cost) if cost is not None else dict.fromkeys(keys, 1.0)
        self._speed = None if cost is None else 1.0  # seconds that a unit of cost takes
        self._workers = max(1, min(workers, len(self._cost)))
        self._total_cost = sum(self._cost.values())
        self._done_cost = self._done_seconds = 0.0
        self._failed = 0
        self._start = time.monotonic()
        self._stop = threading.Event()
        form = "{desc}: {n}/{total} |{bar:20}| {elapsed}{postfix}"
        self._bar = tqdm(total=len(self._cost), desc=title, bar_format=form, disable=not show)
        # A tick shows that a long run is alive. A log file keeps every one of them, so there they are rare.
        self._period = 1.0 if sys.stderr.isatty() else 10.0
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> SweepProgress:
        self._refresh()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._ticker.join()
        self._bar.close()

    def finished(self, key: str, seconds: float, failed: bool) -> None:
        """Count one run. A failed one tells nothing about how long the others take."""
        if failed:
            self._failed += 1
            self._total_cost -= self._cost[key]
        else:
            self._done_cost += self._cost[key]
            self._done_seconds += seconds
            if self._done_cost > 0:
                self._speed = self._done_seconds / self._done_cost
        self._bar.n += 1  # update(1) would draw once more, with the old estimate
        self._refresh()

    def unneeded(self, keys: Iterable[str]) -> None:
        """Count runs no more that need not be done."""
        for key in keys:
            self._total_cost -= self._cost[key]
            self._bar.total -= 1

    def seconds_left(self) -> float | None:
        """Estimated time until the last run ends; None while nothing is known."""
        if self._speed is None:
            return None
        gone = time.monotonic() - self._start
        return max(0.0, self._total_cost * self._speed / self._workers - gone, self._left_at_this_pace(gone))

    def _left_at_this_pace(self, gone: float) -> float:
        """Seconds, if the rest takes as long as what is done; of the runs under way one half is."""
        remaining = self._total_cost - self._done_cost
        open_runs = self._bar.total - self._bar.n
        if not self._done_cost or not open_runs:
            return 0.0
        done = self._done_cost + remaining / open_runs * min(self._workers, open_runs) / 2
        return gone * (self._total_cost - done) / done

    def _tick(self) -> None:
        while not self._stop.wait(self._period):
            self._refresh()

    def _refresh(self) -> None:
        left = self.seconds_left()
        notes = [f"{self._failed} failed"] if self._failed else []
        if self._bar.n < self._bar.total:
            notes.append("time left unknown" if left is None else f"about {duration(left)} left")
        self._bar.set_postfix_str(", ".join(notes))


def duration(seconds: float) -> str:
    """A length of time for people: '42 s', '7 min', '2 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
