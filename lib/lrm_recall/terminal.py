"""What a running notebook prints, shown on the terminal it was started from.

Whole lines are passed on. A progress bar redraws its line many times a second; on a terminal the newest state
stays in one line, in a log file it is written now and then.
"""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class NotebookLines:
    """A writable stream for papermill's `stderr_file`, that knows progress bars.

    Args:
        period: least seconds between two states of a bar; default: 0.2 on a terminal, 30 in a file.
    """

    def __init__(self, period: float | None = None):
        self._terminal = sys.stderr.isatty()
        self._period = period if period is not None else (0.2 if self._terminal else 30.0)
        self._line = ""  # what has come since the last newline
        self._shown, self._shown_at = "", time.monotonic()
        self._bar: tqdm | None = None

    def write(self, text: str) -> None:
        """Take what the notebook wrote: whole lines go out, the last state of a bar when it is time."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._print(_last_state(line))
        self._line = state = _last_state(self._line)
        if state and state != self._shown and time.monotonic() - self._shown_at >= self._period:
            self._shown, self._shown_at = state, time.monotonic()
            if not self._terminal:
                self._print(state)
            else:
                if self._bar is None:
                    self._bar = tqdm(bar_format="{desc}", position=1, leave=False, dynamic_ncols=True)
                self._bar.set_description_str(state)

    def flush(self) -> None:
        """Nothing is held back but the state of a bar."""

    def close(self) -> None:
        """Print what has come since the last newline, and give the bar's line back."""
        if self._bar is not None:
            self._bar.close()
        if self._line:
            self._print(self._line)
            self._line = ""

    def _print(self, line: str) -> None:
        if line.strip():
            tqdm.write(line, file=sys.stderr)


def _last_state(line: str) -> str:
    """What a line shows in the end: the text behind its last carriage return that has some."""
    return next((state for state in reversed(line.split("\r")) if state.strip()), "")
