"""What a training run shows: a progress bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moezoo.core.training.evaluation import Evaluation
from moezoo.core.training.metrics import worst_load

_LINE_EVERY_S = 10.0
_MANY_EXPERTS = 16


class Reporter(Protocol):
    """What the train loop tells; nothing here changes what it computes."""

    def start(self, step: int, total_steps: int) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def validating(self, done: int, total: int) -> None: ...
    def message(self, text: str) -> None: ...
    def stop(self) -> None: ...


class SilentReporter:
    """For tests and scripts."""

    def start(self, step: int, total_steps: int) -> None:
        """Nothing."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def validating(self, done: int, total: int) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


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


def describe_evaluation(evaluation: Evaluation) -> str:
    """Validation loss in nats and bits per byte, and the distance from the optimum where it is known."""
    lines = [
        f"validation loss {evaluation.validation_loss:.4f} nats per token"
        + (f", {evaluation.bits_per_byte:.4f} bits per byte" if evaluation.bits_per_byte is not None else "")
        + f"  ({evaluation.windows} windows of {evaluation.sequence_length} tokens)"
    ]
    if evaluation.inference_loss is not None:
        gap = evaluation.inference_loss - evaluation.validation_loss
        lines.append(f"by the routing of inference: {evaluation.inference_loss:.4f} nats per token ({gap:+.4f})")
    if evaluation.optimum is not None:
        optimum = evaluation.optimum
        lines.append(
            f"where the window shows the whole past that matters: {optimum.loss:.4f} nats, best possible "
            f"{optimum.best_possible:.4f}: {100 * optimum.excess:.1f} % above the optimum  "
            f"({optimum.characters:,} characters)"
        )
    return "\n".join(lines)


def describe_routing(evaluation: Evaluation) -> list[str]:
    """A line a layer: the load of each expert, or of many the most and the least; and what was dropped."""
    lines = []
    for row in evaluation.routing:
        loads = [share * len(row["load"]) for share in row["load"]]
        shown = " ".join(f"{load:.2f}" for load in loads)
        if len(loads) > _MANY_EXPERTS:
            shown = f"{min(loads):.2f} to {max(loads):.2f} of {len(loads)} experts"
        lines.append(f"layer {row['layer']}: load {shown} (1 is balanced), dropped {100 * row['dropped']:.2f} %")
    return lines


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
