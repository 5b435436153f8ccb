"""Progress lines of a run without a terminal: one every ten seconds, with the estimated time left."""

import io

import pytest
from rich.console import Console

from moezoo.cli.progress import ConsoleReporter
from moezoo.core import progress as module
from moezoo.core.training.metrics import StepRecord


class Clock:
    """Replacement for `time` whose clock the test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def record(step: int) -> StepRecord:
    return StepRecord(step, 0, {"loss": 1.0, "cross_entropy": 1.0}, 1.0, 1e-3, None)


def lines_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_eta_excludes_the_first_step_which_compiles(clock):
    console = Console(file=io.StringIO(), width=100)
    reporter = ConsoleReporter(console)
    reporter.start(0, 10)
    for step, seconds in [(1, 300), (2, 20), (3, 20), (4, 5), (5, 15)]:
        clock.now += seconds
        reporter.step(record(step))
    assert [line.split("  loss")[0].split() for line in lines_of(console)] == [
        ["step", "1/10", "eta", "-:--:--"],
        ["step", "2/10", "eta", "0:02:40"],
        ["step", "3/10", "eta", "0:02:20"],
        ["step", "5/10", "eta", "0:01:15"],  # step 4 was five seconds after a line
    ]


def test_resumed_run_estimates_from_its_own_steps(clock):
    console = Console(file=io.StringIO(), width=100)
    reporter = ConsoleReporter(console)
    reporter.start(100, 110)
    for step in (101, 102):
        clock.now += 30
        reporter.step(record(step))
    assert "eta 0:04:00" in lines_of(console)[1]


def test_only_a_long_validation_prints_progress(clock):
    console = Console(file=io.StringIO(), width=100)
    reporter = ConsoleReporter(console)
    reporter.start(0, 1)
    for done in (8, 16, 24, 32):
        clock.now += 4
        reporter.progress("evaluating", done, 64)
    assert lines_of(console) == ["evaluating: 32 of 64 windows  eta 0:00:16"]
    for done in (64, 8, 16):
        reporter.progress("evaluating", done, 64)
    assert len(lines_of(console)) == 1


def test_terminal_shows_a_bar_during_each_validation():
    reporter = ConsoleReporter(Console(file=io.StringIO(), width=120, force_terminal=True))
    reporter.start(0, 3)
    try:
        bar = next(task for task in reporter._progress.tasks if task.description == "validate")
        for _ in range(2):
            assert not bar.visible
            reporter.progress("evaluating", 8, 64)
            assert (bar.visible, bar.completed, bar.total) == (True, 8, 64)
            reporter.progress("evaluating", 64, 64)
        assert not bar.visible
    finally:
        reporter.stop()
