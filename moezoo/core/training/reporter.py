"""What the training loop reports while it runs."""

from collections.abc import Mapping
from typing import Any, Protocol


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
