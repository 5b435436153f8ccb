"""The interface through which the training loop reports progress; the console implementation is cli/progress.py."""

from typing import Protocol

from moezoo.core.training.metrics import StepRecord


class Reporter(Protocol):
    """Callbacks of the training loop. They observe only: nothing here changes what is computed."""

    def start(self, step: int, total_steps: int) -> None:
        """Training starts after `step` finished updates (0 for a new run) and ends after `total_steps`."""
        ...

    def step(self, record: StepRecord) -> None:
        """A record was logged: the newest step of each `training.log_every`, and the first one of the process."""
        ...

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Validation (`what`) has scored `done` of `total` windows."""
        ...

    def message(self, text: str) -> None:
        """A line for the user: resuming, skipped checkpoints, validation results."""
        ...

    def stop(self) -> None:
        """Training has ended, also after an exception or a signal."""
        ...


class SilentReporter:
    """A reporter that discards everything, for tests, scripts, and all processes but the first."""

    def start(self, step: int, total_steps: int) -> None:
        """Ignored."""

    def step(self, record: StepRecord) -> None:
        """Ignored."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""

    def stop(self) -> None:
        """Ignored."""
