"""Progress of a training run: a progress bar in a terminal, plain lines elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moezoo.core.progress import Pace
from moezoo.core.training.metrics import StepRecord


class ConsoleReporter:
    """Reporter that prints ETA, loss, weighted auxiliary losses, tokens/s and the worst expert load."""

    def __init__(self, console: Console):
        self._console = console
        self._progress: Progress | None = None

    def start(self, step: int, total_steps: int) -> None:
        self._pace = Pace(step + 1)  # the first step compiles, so it does not count
        self._total_steps = total_steps
        self._validation_pace: Pace | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("train", total=total_steps, completed=step, numbers="")
            self._validation = self._progress.add_task("validate", start=False, visible=False, numbers="windows")

    def step(self, record: StepRecord) -> None:
        numbers, step, total = describe_step(record), record.step, self._total_steps
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif self._pace.is_due(step, total):
            eta = self._pace.eta(step, total)
            self._console.print(f"step {step:>6}/{total}  eta {eta}  {numbers}", highlight=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int | None) -> None:
        pace = self._validation_pace  # None at the first call of a validation
        self._validation_pace = None if done == total else pace or Pace(done)
        if self._progress is not None:
            if pace is None:
                self._progress.reset(self._validation, total=total)
            self._progress.update(self._validation, completed=done, visible=done != total)
        elif pace is not None and done != total and pace.is_due(done):
            of = "" if total is None else f" of {total:,}"
            line = f"{what}: {done:,}{of} windows  eta {pace.eta(done, total)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe_step(record: StepRecord) -> str:
    """Return `loss 1.2340  cross_entropy 1.2200  switch_balance +0.0100  12,345 tokens/s  worst load 1.32x`."""
    parts = [f"loss {record.loss:.4f}"]
    if record.weighted_losses:
        parts.append(f"cross_entropy {record.losses['cross_entropy']:.4f}")
        parts.extend(f"{name} +{value:.4f}" for name, value in record.weighted_losses.items())
    if record.tokens_per_second:
        parts.append(f"{record.tokens_per_second:,.0f} tokens/s")
    if record.worst_load is not None:
        parts.append(f"worst load {record.worst_load:.2f}x")
    return "  ".join(parts)
