"""Progress of training for scripts and notebooks: lines of text, or bars."""

import html
import sys
import time
from typing import Any

from moezoo.core.progress import Pace
from moezoo.core.training.metrics import StepRecord
from moezoo.core.training.reporter import Reporter, SilentReporter

_SHOWN_EVERY_S = 0.2


def python_reporter() -> Reporter:
    """Return the reporter of `moezoo.train`: bars in a notebook, lines elsewhere."""
    return NotebookReporter() if "ipykernel" in sys.modules else LineReporter()


class NotebookReporter(SilentReporter):
    """Reporter that shows a bar of training and a bar of each validation, and prints messages below them.

    A bar is one output of the cell, whose content is replaced: a saved notebook has its last state, and nothing else.
    """

    def __init__(self) -> None:
        self._training: _Bar | None = None
        self._validation: _Bar | None = None

    def start(self, step: int, total_steps: int) -> None:
        self._pace, self._total_steps = Pace(step + 1), total_steps  # the first step compiles, so it does not count
        if step < total_steps:
            self._training = _Bar()
            self._training.show(step, total_steps, f"compiling and running step {step + 1} ...")

    def step(self, record: StepRecord) -> None:
        self._pace.is_due(record.step)  # which starts the clock
        line = _step_line(record, self._total_steps, self._pace)
        if self._training is not None:
            self._training.show(record.step, self._total_steps, line)

    def progress(self, what: str, done: int, total: int | None) -> None:
        if self._validation is None:
            self._validation = _Bar()
        self._validation.show(done, total, _windows_line(what, done, total))
        if done == total:
            self._validation = None

    def message(self, text: str) -> None:
        print(text, flush=True)


class _Bar:
    """A bar of progress with a text beside it, in a notebook."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_s = 0.0

    def show(self, done: int, total: int | None, text: str) -> None:
        """Show the state; one that follows another within a fifth of a second only if it is the last."""
        from IPython.display import display

        if self._handle is not None and done != total and time.monotonic() - self._shown_s < _SHOWN_EVERY_S:
            return
        bar = "" if total is None else f'<progress value="{done}" max="{total}" style="width: 12em"></progress> '
        content = {"text/html": f"{bar}<code>{html.escape(text)}</code>", "text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
        self._shown_s = time.monotonic()


class LineReporter(SilentReporter):
    """Reporter that writes to standard output.

    In a terminal one line is rewritten; elsewhere a line is printed every 10 s.
    """

    def __init__(self) -> None:
        self._rewrites = sys.stdout.isatty()
        self._width, self._shown_s = 0, 0.0

    def start(self, step: int, total_steps: int) -> None:
        self._pace, self._total_steps = Pace(step + 1), total_steps  # the first step compiles, so it does not count
        if step < total_steps:
            self._show(f"compiling and running step {step + 1} ...")

    def step(self, record: StepRecord) -> None:
        due = self._pace.is_due(record.step, self._total_steps)
        line = _step_line(record, self._total_steps, self._pace)
        if self._rewrites and (due or time.monotonic() - self._shown_s > _SHOWN_EVERY_S):
            self._show(line)
        elif due:
            self.message(line)

    def progress(self, what: str, done: int, total: int | None) -> None:
        if self._rewrites and done != total:
            self._show(_windows_line(what, done, total))

    def message(self, text: str) -> None:
        self._show("")
        print(text, flush=True)

    def stop(self) -> None:
        self._show("")

    def _show(self, line: str) -> None:
        """Rewrite the line in place."""
        if self._rewrites and (line or self._width):
            print(f"\r{line.ljust(self._width)}" + ("" if line else "\r"), end="", flush=True)
            self._width, self._shown_s = len(line), time.monotonic()
        elif line:
            print(line, flush=True)


def _step_line(record: StepRecord, total_steps: int, pace: Pace) -> str:
    numbers = "  ".join(step_numbers(record)[:2])
    return f"step {record.step:>6}/{total_steps}  eta {pace.eta(record.step, total_steps)}  {numbers}"


def _windows_line(what: str, done: int, total: int | None) -> str:
    return f"{what}: {done:,}" + ("" if total is None else f" of {total:,}") + " windows"


def step_numbers(record: StepRecord) -> list[str]:
    """Return `loss 1.2340`, `12,345 tokens/s`, `worst load 1.32x (layer 0 expert 1)`, and the terms of the loss.

    These are `cross_entropy 1.2200`, `router_z +0.0100`.
    """
    parts = [f"loss {record.loss:.4f}"]
    if record.tokens_per_second:
        parts.append(f"{record.tokens_per_second:,.0f} tokens/s")
    worst = record.worst_layer
    if worst is not None:
        parts.append(f"worst load {worst.worst_load:.2f}x (layer {worst.layer} expert {worst.worst_expert})")
    if record.weighted_losses:
        parts.append(f"cross_entropy {record.losses['cross_entropy']:.4f}")
        parts.extend(f"{name} +{value:.4f}" for name, value in record.weighted_losses.items())
    return parts
