"""Progress of a run: a bar that fits into the terminal; elsewhere a line every ten seconds, with the time left."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from moezoo.cli.progress import ConsoleReporter
from moezoo.core import progress as module
from moezoo.core.training.metrics import LayerRecord, RoutingStatistics, StepRecord


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


@pytest.fixture(autouse=True)
def _terminal(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


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
    assert lines_of(console)[0] == "compiling and running step 1 ..."
    assert [line.split("  loss")[0].split() for line in lines_of(console)[1:]] == [
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
    assert "eta 0:04:00" in lines_of(console)[2]


def test_only_a_long_validation_prints_progress(clock):
    console = Console(file=io.StringIO(), width=100)
    reporter = ConsoleReporter(console)
    reporter.start(1, 1)
    for done, seconds in [(0, 4), (8, 30), (16, 4), (24, 4), (32, 4)]:  # the first batch compiles
        clock.now += seconds
        reporter.progress("evaluating", done, 64)
    assert lines_of(console) == ["evaluating: 32 of 64 windows  eta 0:00:16"]
    for done in (64, 0, 8, 16):
        reporter.progress("evaluating", done, 64)
    assert len(lines_of(console)) == 1


def test_terminal_shows_a_bar_during_each_validation():
    reporter = ConsoleReporter(Console(file=io.StringIO(), width=120, force_terminal=True))
    reporter.start(0, 3)
    try:
        bar = next(task for task in reporter._progress.tasks if task.description == "validate")
        for _ in range(2):
            assert not bar.visible
            for done in (0, 8):
                reporter.progress("evaluating", done, 64)
                assert (bar.visible, bar.completed, bar.total) == (True, done, 64)
                assert [task.visible for task in reporter._progress.tasks].count(True) == 1
            reporter.progress("evaluating", 64, 64)
        assert not bar.visible
    finally:
        reporter.stop()


FULL = StepRecord(
    1234,
    0,
    {"loss": 1.2345, "cross_entropy": 1.2, "router_z": 0.1, "router_z_weighted": 0.01},
    1.0,
    1e-3,
    12345.6,
    (LayerRecord(RoutingStatistics(0, (0.34, 0.66), 1.32, 0.0), {}, {}),),
)
WORST, TERMS = "worst load 1.32x (layer 0 expert 1)", "cross_entropy 1.2000  router_z +0.0100"


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (50, ["", "loss 1.2345  12,346 tokens/s", WORST, TERMS]),
        (80, ["loss 1.2345  12,346 tokens/s", f"{WORST}  {TERMS}"]),
        (100, ["loss 1.2345  12,346 tokens/s", f"{WORST}  {TERMS}"]),
        (120, [f"loss 1.2345  12,346 tokens/s  {WORST}", TERMS]),
        (180, [f"loss 1.2345  12,346 tokens/s  {WORST}  {TERMS}"]),
    ],
)
def test_bar_step_and_eta_stay_and_numbers_wrap_at_every_width(width, lines, clock):
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    reporter = ConsoleReporter(console)
    reporter.start(1232, 10000)
    clock.now += 40
    reporter.step(replace(FULL, step=1233))
    clock.now += 2
    reporter.step(FULL)
    reporter.stop()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    frames = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert "compiling" in frames[0]
    assert all(len(line) <= width for line in frames)
    bar, *below = frames[-len(lines) :]
    for piece in ("train", "━", "1234/10000", "eta 4:52:12", lines[0]):
        assert piece in bar
    assert below == lines[1:]


def test_first_validation_compiles_and_hides_the_numbers_of_training():
    console = Console(file=io.StringIO(), width=60, force_terminal=True)
    reporter = ConsoleReporter(console)
    reporter.start(0, 3)
    reporter.step(replace(FULL, step=1))
    shown = []
    for done in (0, 8, 64, 0):
        reporter.progress("evaluating", done, 64)
        other = Console(file=io.StringIO(), width=60)
        other.print(*reporter._progress.get_renderables())
        shown.append((*(word in other.file.getvalue() for word in ("compiling", "validate", "worst load")),))
    reporter.stop()
    assert shown == [(True, False, False), (False, True, False), (False, False, True), (False, True, False)]


def test_terminal_that_cannot_move_the_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    reporter = ConsoleReporter(console)
    reporter.start(0, 10)
    reporter.step(record(1))
    assert [line[:24] for line in lines_of(console)] == ["compiling and running st", "step      1/10  eta -:--"]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_notebook_and_log_show_whole_lines(width, clock, capsys):
    """A notebook shows HTML; without IPython, rich prints the text."""
    for options in ({"force_jupyter": True}, {"file": io.StringIO()}):
        console = Console(width=width, record=True, **options)
        reporter = ConsoleReporter(console)
        reporter.start(1232, 10000)
        clock.now += 40
        reporter.step(replace(FULL, step=1233))
        reporter.message(f"  moezoo train config.yaml --set {'x' * width} --resume")
        text = console.export_text().splitlines()
        assert text[0] == "compiling and running step 1233 ..."
        assert text[1].startswith("step   1233/10000  eta -:--:--  loss 1.2345  12,346 tokens/s")
        assert text[2].endswith("--resume")
