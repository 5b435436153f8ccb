"""The interface through which the training loop reports progress; the console implementation is cli/progress.py."""

from typing import Protocol

from moezoo.core.training.metrics import StepRecord


class Reporter(Protocol):
    """Callbacks of the training loop. They observe only: nothing here changes what is computed."""

    def start(self, step: int, total_steps: int) -> None:
        """Report the start of training after `step` finished updates (0 for a new run), to end after `total_steps`."""
        ...

    def step(self, record: StepRecord) -> None:
        """Report a logged step: every `training.log_every` steps, and the first one of the process."""
        ...

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Report progress of a validation (`what`): `done` of `total` windows are scored."""
        ...

    def message(self, text: str) -> None:
        """Report a line of text to the user: resuming, skipped checkpoints, validation results."""
        ...

    def stop(self) -> None:
        """Report the end of training, also after an exception or a signal."""
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
