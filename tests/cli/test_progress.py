"""Progress lines without a terminal: one every ten seconds, with an ETA."""

import io

import pytest
from rich.console import Console

from moezoo.cli import progress as module
from moezoo.cli.progress import ConsoleReporter


class Clock:
    """A fake `time.monotonic`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def lines_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_eta_ignores_the_first_step_which_compiles(clock):
    console = Console(file=io.StringIO(), width=100)
    reporter = ConsoleReporter(console)
    reporter.start(0, 10)
    for step, seconds in [(1, 300), (2, 20), (3, 20), (4, 5), (5, 15)]:
        clock.now += seconds
        reporter.step({"step": step, "loss": 1.0})
    assert [line.split("  loss")[0].split() for line in lines_of(console)] == [
        ["step", "1/10", "eta", "-:--:--"],
        ["step", "2/10", "eta", "0:02:40"],
        ["step", "3/10", "eta", "0:02:20"],
        ["step", "5/10", "eta", "0:01:15"],  # the fourth step was five seconds after the last line
    ]


def test_eta_of_a_resumed_run_counts_from_its_first_step(clock):
    console = Console(file=io.StringIO(), width=100)
    reporter = ConsoleReporter(console)
    reporter.start(100, 110)
    for step in (101, 102):
        clock.now += 30
        reporter.step({"step": step, "loss": 1.0})
    assert "eta 0:04:00" in lines_of(console)[1]


def test_only_long_validation_prints_progress(clock):
    console = Console(file=io.StringIO(), width=100)
    reporter = ConsoleReporter(console)
    reporter.start(0, 1)
    for done in (8, 16, 24, 32):
        clock.now += 4
        reporter.validating(done, 64)
    assert lines_of(console) == ["validated 32 of 64 windows  eta 0:00:16"]
    for done in (64, 8, 16):
        reporter.validating(done, 64)
    assert len(lines_of(console)) == 1


def test_terminal_shows_a_bar_during_validation():
    reporter = ConsoleReporter(Console(file=io.StringIO(), width=120, force_terminal=True))
    reporter.start(0, 3)
    try:
        bar = next(task for task in reporter._progress.tasks if task.description == "validate")
        for _ in range(2):
            assert not bar.visible
            reporter.validating(8, 64)
            assert (bar.visible, bar.completed, bar.total) == (True, 8, 64)
            reporter.validating(64, 64)
        assert not bar.visible
    finally:
        reporter.stop()
