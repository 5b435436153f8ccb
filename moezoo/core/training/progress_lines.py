"""Progress of training as lines of text, for scripts and notebooks."""

import sys
import time

from moezoo.core.progress import Pace
from moezoo.core.training.metrics import StepRecord
from moezoo.core.training.reporter import SilentReporter

_SHOWN_EVERY_S = 0.2


class LineReporter(SilentReporter):
    """Reporter that writes to standard output.

    In a terminal or a notebook one line is rewritten; elsewhere a line is printed every 10 s.
    """

    def __init__(self) -> None:
        self._rewrites = sys.stdout.isatty() or "ipykernel" in sys.modules
        self._width, self._shown_s = 0, 0.0

    def start(self, step: int, total_steps: int) -> None:
        self._pace, self._total_steps = Pace(step + 1), total_steps  # the first step compiles, so it does not count
        if step < total_steps:
            self._show(f"compiling and running step {step + 1} ...")

    def step(self, record: StepRecord) -> None:
        total, due = self._total_steps, self._pace.is_due(record.step, self._total_steps)
        eta, numbers = self._pace.eta(record.step, total), "  ".join(step_numbers(record)[:2])
        line = f"step {record.step:>6}/{total}  eta {eta}  {numbers}"
        if self._rewrites and (due or time.monotonic() - self._shown_s > _SHOWN_EVERY_S):
            self._show(line)
        elif due:
            self.message(line)

    def progress(self, what: str, done: int, total: int | None) -> None:
        if self._rewrites and done != total:
            self._show(f"{what}: {done:,}" + ("" if total is None else f" of {total:,}") + " windows")

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
