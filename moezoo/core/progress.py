"""Progress of long operations: the callback type, a clock for rate and time left, and a progress line on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int | None], None]
"""Progress callback, called with (what, done, total), e.g. ("tokenizing a.txt", 1000, 5000) in bytes.

`total` is None if it is unknown. The function that takes the callback documents the unit.
"""

Message = Callable[[str], None]
"""Callback for a line of text to the user."""

LINE_EVERY_S = 10.0


class Pace:
    """Clock of a long operation: rate, time left, and when the next progress line is due.

    Args:
        first: amount of work at which the clock starts, e.g. 1 if the first step compiles and must not count.
        line_every_s: minimum time between two progress lines.
    """

    def __init__(self, first: int = 0, line_every_s: float = LINE_EVERY_S):
        self._first, self._line_every_s = first, line_every_s
        self._start = self._last_line = time.monotonic()

    def is_due(self, done: int, total: int | None = None) -> bool:
        """Return whether to print a line now: at `first`, at the end, and every `line_every_s` in between."""
        now = time.monotonic()
        if done <= self._first:
            self._start = now
        due = done in (self._first, total) or now - self._last_line >= self._line_every_s
        if due:
            self._last_line = now
        return due

    def elapsed_s(self) -> float:
        """Return the seconds since the clock started."""
        return time.monotonic() - self._start

    def per_second(self, done: int) -> float:
        """Return the mean rate so far."""
        elapsed = self.elapsed_s()
        return (done - self._first) / elapsed if elapsed > 0 else 0.0

    def eta(self, done: int, total: int | None) -> str:
        """Return the estimated time left as `h:mm:ss`, or `-:--:--` if it is unknown."""
        if total is None or done <= self._first:
            return "-:--:--"
        return clock(self.elapsed_s() / (done - self._first) * max(0, total - done))


def clock(seconds: float) -> str:
    """Format a duration as `h:mm:ss`."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}"


def bytes_line(what: str, done: int, total: int | None, pace: Pace) -> str:
    """Return a progress line for bytes: `fetching org/name: 1,250 of 5,000 MB, 50 MB/s, eta 0:01:15`."""
    line = f"{what}: {done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f}" if total else "")
    line += f" MB, {pace.per_second(done) / 1e6:,.0f} MB/s"
    return f"{line}, eta {pace.eta(done, total)}" if total else line


@contextlib.contextmanager
def bytes_on_stderr() -> Iterator[Progress]:
    """Yield a progress callback for bytes that prints to stderr.

    In a terminal one line is updated, and cleared at the end; elsewhere a line is printed every 10 s.
    """
    paces: dict[str, Pace] = {}
    terminal = sys.stderr.isatty()

    def show(what: str, done: int, total: int | None) -> None:
        pace = paces.setdefault(what, Pace())
        if terminal:
            sys.stderr.write(f"\r{bytes_line(what, done, total, pace)}\x1b[K")
            sys.stderr.flush()
        elif pace.is_due(done) and pace.elapsed_s() >= LINE_EVERY_S:
            sys.stderr.write(f"{bytes_line(what, done, total, pace)}\n")

    try:
        yield show
    finally:
        if terminal and paces:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
