"""Progress of a training run: one line with a bar in a terminal, plain lines elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from moezoo.core.progress import Pace
from moezoo.core.training.metrics import StepRecord

_TIME = len("0:00:00")


class ConsoleReporter:
    """Reporter that prints ETA, loss, tokens/s, the worst expert load and weighted auxiliary losses.

    In a terminal, the numbers that do not fit into its width are left out, the last ones first.
    """

    def __init__(self, console: Console):
        self._console = console
        self._progress: Progress | None = None

    def start(self, step: int, total_steps: int) -> None:
        self._pace = Pace(step + 1)  # the first step compiles, so it does not count
        self._total_steps = total_steps
        self._validation_pace: Pace | None = None
        if self._console.is_terminal:
            self._progress = Progress(*_columns(self._console.width), console=self._console)
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
            shown = _fitting(numbers, room)
            self._progress.update(self._task, description="train", completed=step, eta=eta, numbers=shown)
        elif due:
            self.message(f"step {step:>6}/{total}  eta {eta}  {'  '.join(numbers)}")

    def progress(self, what: str, done: int, total: int | None) -> None:
        pace = self._validation_pace  # None until the first batch is done, which may compile
        self._validation_pace = None if done in (0, total) else pace or Pace(done)
        if self._progress is not None:
            if done == 0:
                self._progress.reset(self._validation, total=total)
            # One line at a time: notebooks, and logs of terminals, cannot go up by a line.
            self._progress.update(self._task, visible=done == total)
            eta = "-:--:--" if pace is None else pace.eta(done, total)
            self._progress.update(self._validation, total=total, completed=done, visible=done != total, eta=eta)
        elif pace is not None and done != total and pace.is_due(done):
            of = "" if total is None else f" of {total:,}"
            self.message(f"{what}: {done:,}{of} windows  eta {pace.eta(done, total)}")

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _columns(width: int) -> tuple[TextColumn | BarColumn | MofNCompleteColumn | TimeElapsedColumn, ...]:
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


def _fitting(parts: list[str], width: int) -> str:
    """Join the first parts that fit into a width."""
    while parts and len("  ".join(parts)) > width:
        parts = parts[:-1]
    return "  ".join(parts)


def step_numbers(record: StepRecord) -> list[str]:
    """Return `loss 1.2340`, `12,345 tokens/s`, `worst load 1.32x`, `cross_entropy 1.2200`, `router_z +0.0100`."""
    parts = [f"loss {record.loss:.4f}"]
    if record.tokens_per_second:
        parts.append(f"{record.tokens_per_second:,.0f} tokens/s")
    if record.worst_load is not None:
        parts.append(f"worst load {record.worst_load:.2f}x")
    if record.weighted_losses:
        parts.append(f"cross_entropy {record.losses['cross_entropy']:.4f}")
        parts.extend(f"{name} +{value:.4f}" for name, value in record.weighted_losses.items())
    return parts
