"""The record of a training process in its run folder, written by following the loop."""

import sys
from collections.abc import Mapping
from typing import Any

from moezoo.core.errors import RunError
from moezoo.core.files import reason_of
from moezoo.core.progress import Message
from moezoo.core.runs.run_folder import Run
from moezoo.core.runs.sessions import append_line, now
from moezoo.core.training.metrics import StepRecord
from moezoo.core.training.reporter import SilentReporter


class SessionLog(SilentReporter):
    """Reporter that adds a session to `sessions.jsonl`. If that fails, training goes on, after one warning."""

    def __init__(self, run: Run, session: Mapping[str, Any], say: Message):
        self._run, self._session, self._say = run, session, say
        self._begun = self._failed = False
        self._step = 0

    def start(self, step: int, total_steps: int) -> None:
        self._first = self._step = step
        if not self._run.is_new:
            self._begin()

    def step(self, record: StepRecord) -> None:
        self._step = record.step
        if not self._begun:  # the folder of a new run is made after its first step
            self._begin()

    def stop(self) -> None:
        if self._begun:
            error = sys.exc_info()[0]
            self._append({"ended": now(), "last_step": self._step, "error": None if error is None else error.__name__})

    def _begin(self) -> None:
        self._begun = True
        self._append({**self._session, "first_step": self._first})

    def _append(self, values: Mapping[str, Any]) -> None:
        if self._failed:
            return
        try:
            append_line(self._run.path, values)
        except (OSError, RunError) as error:
            self._failed = True
            self._say(f"warning: the session is not recorded in {self._run.path} ({reason_of(error)})")
