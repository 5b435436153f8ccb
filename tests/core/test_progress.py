import io

import pytest

from moezoo.core import progress
from moezoo.core.progress import Pace, bytes_line, bytes_on_stderr


class Clock:
    """Replacement for `time` whose clock the test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Stderr(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_line_is_due_at_the_start_at_the_end_and_every_ten_seconds(clock):
    pace = Pace(first=1)
    due = []
    for done in range(1, 8):
        due.append(pace.is_due(done, 7))
        clock.now += 4
    assert due == [True, False, False, True, False, False, True]


def test_eta_counts_from_the_first(clock):
    pace = Pace(first=1)
    clock.now += 300  # compiling
    assert pace.is_due(1, 10)
    assert pace.eta(1, 10) == "-:--:--"
    clock.now += 500
    assert pace.eta(2, 10) == "1:06:40"
    assert pace.per_second(2) == 1 / 500
    assert pace.elapsed_s() == 500
    assert pace.eta(2, None) == "-:--:--"
    assert pace.eta(12, 10) == "0:00:00"


def test_bytes_line_has_amount_rate_and_eta(clock):
    pace = Pace()
    assert bytes_line("fetching a/b", 0, 5 * 10**9, pace) == "fetching a/b: 0 of 5,000 MB, 0 MB/s, eta -:--:--"
    clock.now += 25
    line = bytes_line("fetching a/b", 1_250_000_000, 5 * 10**9, pace)
    assert line == "fetching a/b: 1,250 of 5,000 MB, 50 MB/s, eta 0:01:15"
    assert bytes_line("fetching a/b", 1_250_000_000, None, pace) == "fetching a/b: 1,250 MB, 50 MB/s"


def test_terminal_updates_and_clears_one_line(clock, monkeypatch):
    stderr = Stderr(terminal=True)
    monkeypatch.setattr("sys.stderr", stderr)
    with bytes_on_stderr() as show:
        show("a", 10**6, None)
        clock.now += 1
        show("a", 3 * 10**6, None)
    assert stderr.getvalue() == "\ra: 1 MB, 0 MB/s\x1b[K\ra: 3 MB, 3 MB/s\x1b[K\r\x1b[K"


def test_file_gets_a_line_every_ten_seconds_and_none_for_a_short_operation(clock, monkeypatch):
    stderr = Stderr(terminal=False)
    monkeypatch.setattr("sys.stderr", stderr)
    with bytes_on_stderr() as show:
        show("a", 10**6, 10**6)
        for done in range(1, 7):
            show("b", done * 10**6, 6 * 10**6)
            clock.now += 4
    assert stderr.getvalue().splitlines() == ["b: 4 of 6 MB, 0 MB/s, eta 0:00:06"]
