"""Lines of a run that has no terminal: one in ten seconds, with the time that the rest will take."""

import io

import pytest
from rich.console import Console

from moezoo.cli import progress as module
from moezoo.cli.progress import ConsoleReporter


class Clock:
    """`time.monotonic`, but told what time it is."""

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


def test_eta_is_of_the_steps_after_the_first_which_compiles(clock):
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
        ["step", "5/10", "eta", "0:01:15"],  # the fourth came five seconds after a line
    ]


def test_a_resumed_run_counts_from_where_it_goes_on(clock):
    console = Console(file=io.StringIO(), width=100)
    reporter = ConsoleReporter(console)
    reporter.start(100, 110)
    for step in (101, 102):
        clock.now += 30
        reporter.step({"step": step, "loss": 1.0})
    assert "eta 0:04:00" in lines_of(console)[1]


def test_long_validation_says_how_far_it_is_and_short_one_nothing(clock):
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


def test_a_terminal_has_a_bar_for_each_validation_while_it_lasts():
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
