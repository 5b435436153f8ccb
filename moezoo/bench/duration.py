"""Expected duration of a benchmark: the seconds of its units of work, and of those that are left."""

import time
from collections.abc import Mapping, Sequence

from moezoo.bench.case import Case
from moezoo.bench.contenders import Entry
from moezoo.bench.measure import Effort, num_starts
from moezoo.bench.results import Mode

# Guesses for S on two CPU cores, corrected by what the first units take.
_WARM_UP_S, _START_S = 6.0, 12.0


def unit_seconds(mode: Mode, cases: Sequence[Case], entries: Mapping[str, Entry], effort: Effort) -> list[float]:
    """Return the expected seconds of each warm-up, slice or start of one mode and model, in their order.

    `entries`: all contenders, the limit included where the mode has one.
    """
    if mode == "startup":
        return [_START_S] * num_starts(entries, effort)
    turns = sum(case.kind in entry.kinds for case in cases for entry in entries.values())
    return [_WARM_UP_S] * turns + [effort.slice_seconds] * (effort.slices * turns)


class Duration:
    """Clock of a benchmark whose units take about `seconds`, in order."""

    def __init__(self, seconds: Sequence[float]):
        self._seconds = seconds
        self._start = time.monotonic()

    @property
    def expected(self) -> float:
        """Seconds of all units before anything is known."""
        return sum(self._seconds)

    def left(self, done: int) -> float:
        """Return the seconds of the units after the first `done`, at the pace of those."""
        taken, expected = time.monotonic() - self._start, sum(self._seconds[:done])
        return sum(self._seconds[done:]) * (taken / expected if expected else 1.0)
