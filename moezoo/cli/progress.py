"""Progress of a training run: a bar in a terminal, with numbers beside and below it; plain lines elsewhere."""

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from moezoo.cli.output import print_lines
from moezoo.core.progress import Pace
from moezoo.core.training.evaluation import ValidationRecord
from moezoo.core.training.metrics import StepRecord
from moezoo.core.training.progress_lines import step_numbers

_TIME = len("0:00:00")


class ConsoleReporter:
    """Reporter that prints ETA, loss, tokens/s, the worst expert load and weighted auxiliary losses.

    In a terminal, the numbers that do not fit beside the bar are on lines below it.
    """

    def __init__(self, console: Console):
        self._console = console
        self._progress: _Bars | None = None

    def start(self, step: int, total_steps: int) -> None:
        self._pace = Pace(step + 1)  # the first step compiles, so it does not count
        self._total_steps = total_steps
        self._validation_pace: Pace | None = None
        self._validates_first = True
        if self._console.is_interactive:  # not one of a type that cannot move the cursor (TERM=dumb)
            self._progress = _Bars(*_columns(self._console.width), console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("compiling", total=total_steps, completed=step, eta="", numbers="")
            self._validation = self._progress.add_task("validate", visible=False, eta="", numbers="windows")
        elif step < total_steps:
            self.message(f"compiling and running step {step + 1} ...")

    def step(self, record: StepRecord) -> None:
        numbers, step, total = step_numbers(record), record.step, self._total_steps
        due, eta = self._pace.is_due(step, total), self._pace.eta(step, total)
        if self._progress is not None:
            # Trap: cells that do not fit are all cut by the same amount, until neither step nor ETA can be read.
            room = self._console.width - _bar_width(self._console.width)
            room -= len(f"train  {total}/{total}   eta  ") + 2 * _TIME
            first, *below = _wrapped(numbers, room, self._console.width)
            self._progress.below = below
            self._progress.update(self._task, description="train", completed=step, eta=eta, numbers=first)
        elif due:
            self.message(f"step {step:>6}/{total}  eta {eta}  {'  '.join(numbers)}")

    def validation(self, record: ValidationRecord) -> None:
        """The loop says what was found, in a message."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        pace = self._validation_pace  # None until the first batch is done, which may compile
        self._validation_pace = None if done in (0, total) else pace or Pace(done)
        if self._progress is not None:
            if done == 0:
                self._progress.reset(self._validation, total=total)
            self._progress.update(self._task, visible=done == total)
            self._progress.shows_below = done == total
            eta = "-:--:--" if pace is None else pace.eta(done, total)
            what = "compiling" if self._validates_first and done == 0 else "validate"
            self._progress.update(
                self._validation, description=what, total=total, completed=done, visible=done != total, eta=eta
            )
            self._validates_first &= done == 0
        elif pace is not None and done != total and pace.is_due(done):
            of = "" if total is None else f" of {total:,}"
            self.message(f"{what}: {done:,}{of} windows  eta {pace.eta(done, total)}")

    def message(self, text: str) -> None:
        print_lines(self._console, text)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Bars(Progress):
    """Bars of training and validation.

    Fields:
        below: lines below the bar of training.
        shows_below: whether that bar is the one that is visible.
    """

    def __init__(self, *columns: ProgressColumn, console: Console):
        self.below: list[str] = []
        self.shows_below = True
        super().__init__(*columns, console=console)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.shows_below:
            yield from (Text(line, no_wrap=True, overflow="ellipsis") for line in self.below)


def _columns(width: int) -> tuple[ProgressColumn, ...]:
    def fixed() -> Column:
        return Column(no_wrap=True)

    return (
        TextColumn("{task.description}", table_column=fixed()),
        BarColumn(bar_width=_bar_width(width), table_column=fixed()),
        MofNCompleteColumn(table_column=fixed()),
        TimeElapsedColumn(table_column=fixed()),
        TextColumn("eta {task.fields[eta]}", table_column=fixed()),
        TextColumn("{task.fields[numbers]}", table_column=fixed()),
    )


def _bar_width(width: int) -> int:
    return max(4, min(24, width // 8))


def _wrapped(parts: list[str], first: int, width: int) -> list[str]:
    """Join parts into lines: the first of `first` columns, which may be empty, the others of `width`."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}  {part}" if lines[-1] else part
        if len(longer) <= (first if len(lines) == 1 else width):
            lines[-1] = longer
        else:
            lines.append(part)
    return lines
