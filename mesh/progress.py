"""How far something long has got, in one line on a terminal; nothing where stderr is none."""

from __future__ import annotations

import sys
import time

_QUIET = 1.0  # seconds before the first line: what is short says nothing
_SHOWN = 0.2  # seconds between two


class Progress:
    """Counts what is done.

    Args:
        what: stands before the figures. total: how many there are, where that is known.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._next = self._began + _QUIET if sys.stderr.isatty() else float("inf")
        self._shown = False

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if time.monotonic() >= self._next:
            self._show()

    def close(self) -> None:
        """The last line stays."""
        if self._shown:
            self._show()
            sys.stderr.write("\n")

    def _show(self) -> None:
        self._next, self._shown = time.monotonic() + _SHOWN, True
        sys.stderr.write(f"\r\x1b[K{line(self._what, self._done, self._total, time.monotonic() - self._began)}")
        sys.stderr.flush()


def line(what: str, done: int, total: int | None, seconds: float) -> str:
    """Count, rate, and the time left where the total is known."""
    rate = done / seconds if seconds > 0 else 0.0
    if total is None:
        return f"{what}: {done:,} · {rate:,.0f}/s"
    left = f" · {_clock((total - done) / rate)} left" if rate and done < total else ""
    return f"{what}: {done:,} of {total:,} · {rate:,.0f}/s{left}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
