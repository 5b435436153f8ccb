"""Trackers as reporters of the training loop."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from moezoo.core.config.run_config import Config, TrackerName
from moezoo.core.errors import SpecError
from moezoo.core.files import reason_of
from moezoo.core.progress import Message
from moezoo.core.runs.run_folder import Run
from moezoo.core.trackers.tensorboard import TensorBoard
from moezoo.core.trackers.tracker import TrackedRun, Tracker
from moezoo.core.trackers.trackio import Trackio
from moezoo.core.trackers.values import step_values, validation_values
from moezoo.core.trackers.wandb import Wandb
from moezoo.core.training.evaluation import ValidationRecord
from moezoo.core.training.metrics import StepRecord, read_metrics
from moezoo.core.training.reporter import SilentReporter

Opener = Callable[[TrackedRun], Tracker]

_OPENERS: dict[TrackerName, Opener] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raise SpecError if the package of a tracker is not installed; none is imported."""
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise SpecError(
            f"trackers lists {', '.join(missing)}, not installed; expected installed packages. Install them with "
            f"pip install {' '.join(missing)} (all: moezoo[trackers]), or use --set trackers=[]."
        )


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # Trap: a folder `wandb` of earlier runs in the current folder is found as a package without a file.
    return spec is not None and spec.origin is not None


def tracker_reporters(config: Config, run: Run, say: Message) -> list["TrackerReporter"]:
    """Return a reporter for each tracker of a config. It opens at the first step, when the run has its folder.

    `say` takes where a tracker logs to, and a warning if it fails. Raises SpecError: a package is not installed.
    """
    if not config.trackers:
        return []
    check_installed(config.trackers)
    logged_to = max((line["step"] for line in read_metrics(run.metrics_path)), default=0)
    tracked = TrackedRun(run.name, run.path / "trackers", config.model_dump(mode="json"), 0, logged_to)
    return [TrackerReporter(name, _OPENERS[name], tracked, say) for name in config.trackers]


class TrackerReporter(SilentReporter):
    """A tracker that follows a run. If it fails, training goes on without it, after one warning."""

    def __init__(self, name: str, opener: Opener, run: TrackedRun, say: Message):
        self._name, self._open, self._run, self._say = name, opener, run, say
        self._tracker: Tracker | None = None
        self._failed = False

    def start(self, step: int, total_steps: int) -> None:
        self._run = replace(self._run, first_step=step)

    def step(self, record: StepRecord) -> None:
        self._log(record.step, step_values(record))

    def validation(self, record: ValidationRecord) -> None:
        self._log(record.step, validation_values(record))

    def stop(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close(failed=sys.exc_info()[0] is not None)
            except Exception as error:
                self._fail(error, "at the end")

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._failed:
            return
        try:
            if self._tracker is None:
                self._tracker = self._open(self._run)
                self._say(f"tracker {self._name}: {self._tracker.place}")
            self._tracker.log(step, values)
        except Exception as error:
            self._fail(error, f"at step {step}")

    def _fail(self, error: Exception, when: str) -> None:
        self._failed = True
        found = f"{type(error).__name__}: {reason_of(error)}"
        self._say(f"warning: tracker {self._name} failed {when} and is off; training goes on ({found})")
