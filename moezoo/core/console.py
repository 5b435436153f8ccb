"""What a training run shows: a progress bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moezoo.core.evaluation import Evaluation
from moezoo.core.metrics import worst_load

_LINE_EVERY_S = 10.0
_MANY_EXPERTS = 16


class Reporter(Protocol):
    """What the train loop tells; nothing here changes what it computes."""

    def start(self, step: int, total_steps: int) -> None: ...
    def step(self, record: Mapping[str, Any]) -> None: ...
    def message(self, text: str) -> None: ...
    def stop(self) -> None: ...


class SilentReporter:
    """For tests and scripts."""

    def start(self, step: int, total_steps: int) -> None:
        """Nothing."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class ConsoleReporter:
    """Progress with ETA, loss, tokens/s, each auxiliary loss by name and weighted value, and the worst expert load."""

    def __init__(self, console: Console):
        self._console = console
        self._progress: Progress | None = None
        self._last_line = 0.0

    def start(self, step: int, total_steps: int) -> None:
        self._total, self._first, self._started = total_steps, step, time.monotonic()
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

    def step(self, record: Mapping[str, Any]) -> None:
        numbers, step = describe_step(record), int(record["step"])
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if step == self._first + 1:  # it compiled; later steps say how long a step takes
            self._started, self._first = now, step
        if now - self._last_line >= _LINE_EVERY_S or step == self._total:
            self._last_line = now
            done = step - self._first
            eta = _clock((now - self._started) / done * (self._total - step)) if done else "-:--:--"
            self._console.print(f"step {step:>6}/{self._total}  eta {eta}  {numbers}", highlight=False, soft_wrap=True)

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
