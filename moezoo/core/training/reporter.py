"""The interface through which the training loop reports progress.

Implementations: the console in cli/progress.py, trackers in core/trackers/reporter.py.
"""

from typing import Protocol

from moezoo.core.training.evaluation import ValidationRecord
from moezoo.core.training.metrics import StepRecord


class Reporter(Protocol):
    """Callbacks of the training loop. They observe only: nothing here changes what is computed."""

    def start(self, step: int, total_steps: int) -> None:
        """Report the start of training after `step` finished updates (0 for a new run), to end after `total_steps`."""
        ...

    def step(self, record: StepRecord) -> None:
        """Report a logged step: every `training.log_every` steps, and the first one of the process."""
        ...

    def validation(self, record: ValidationRecord) -> None:
        """Report a finished validation."""
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

    def validation(self, record: ValidationRecord) -> None:
        """Ignored."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Ignored."""

    def message(self, text: str) -> None:
        """Ignored."""

    def stop(self) -> None:
        """Ignored."""


class Reporters:
    """Several reporters as one, called in their order."""

    def __init__(self, *reporters: Reporter):
        self._reporters = reporters

    def start(self, step: int, total_steps: int) -> None:
        for reporter in self._reporters:
            reporter.start(step, total_steps)

    def step(self, record: StepRecord) -> None:
        for reporter in self._reporters:
            reporter.step(record)

    def validation(self, record: ValidationRecord) -> None:
        for reporter in self._reporters:
            reporter.validation(record)

    def progress(self, what: str, done: int, total: int | None) -> None:
        for reporter in self._reporters:
            reporter.progress(what, done, total)

    def message(self, text: str) -> None:
        for reporter in self._reporters:
            reporter.message(text)

    def stop(self) -> None:
        for reporter in self._reporters:
            reporter.stop()
