"""What a training run shows: a progress bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moezoo.core.training.metrics import worst_load

_LINE_EVERY_S = 10.0


class _Pace:
    """When the next line of something long is due, and how long the rest takes, by what came after `first`."""

    def __init__(self, first: int, total: int):
        self.total, self._first = total, first
        self._last_line = self._began = time.monotonic()

    def is_due(self, done: int) -> bool:
        """Whether to print a line now: the first, one in ten seconds, and the last."""
        now = time.monotonic()
        if done <= self._first:
            self._began = now
        due = done in (self._first, self.total) or now - self._last_line >= _LINE_EVERY_S
        if due:
            self._last_line = now
        return due

    def eta(self, done: int) -> str:
        """Of the rest, as a clock has it."""
        if done <= self._first:
            return "-:--:--"
        return _clock((time.monotonic() - self._began) / (done - self._first) * (self.total - done))


class ConsoleReporter:
    """Progress with ETA, loss, tokens/s, each auxiliary loss by name and weighted value, and the worst expert load."""

    def __init__(self, console: Console):
        self._console = console
        self._progress: Progress | None = None

    def start(self, step: int, total_steps: int) -> None:
        # The first step compiles; those after it say how long a step takes.
        self._steps = _Pace(step + 1, total_steps)
        self._windows: _Pace | None = None
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

    def step(self, record: Mapping[str, Any]) -> None:
        numbers, step = describe_step(record), int(record["step"])
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif self._steps.is_due(step):
            eta, total = self._steps.eta(step), self._steps.total
            self._console.print(f"step {step:>6}/{total}  eta {eta}  {numbers}", highlight=False, soft_wrap=True)

    def validating(self, done: int, total: int) -> None:
        begun, self._windows = self._windows, None if done == total else self._windows or _Pace(done, total)
        if self._progress is not None:
            if begun is None:
                self._progress.reset(self._validation, total=total)
            self._progress.update(self._validation, completed=done, visible=done < total)
        elif begun is not None and self._windows is not None and self._windows.is_due(done):
            eta = self._windows.eta(done)
            self._console.print(f"validated {done:,} of {total:,} windows  eta {eta}", highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe_step(record: Mapping[str, Any]) -> str:
    """`loss 1.234  ce 1.220  switch_balance 0.010  router_z 0.004  12,345 tok/s  worst load 1.32x`."""
    parts = [f"loss {record['loss']:.4f}"]
    weighted = {key.removesuffix("_weighted"): value for key, value in record.items() if key.endswith("_weighted")}
    if weighted:
        parts.append(f"cross_entropy {record['cross_entropy']:.4f}")
        parts.extend(f"{name} +{value:.4f}" for name, value in weighted.items())
    if record.get("tokens_per_second"):
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    worst = worst_load(record.get("routing", ()))
    if worst is not None:
        parts.append(f"worst load {worst:.2f}x")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
