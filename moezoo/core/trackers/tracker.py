"""The interface of a tracker, and what it is told of a run."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moezoo.core.files import make_folder, read_bounded, write_atomically

PROJECT = "moezoo"
"""Project of all runs, in trackers that have projects."""

_ID_BYTES = 100


@dataclass(frozen=True)
class TrackedRun:
    """A run that is tracked, from the first step of this process on.

    Fields:
        name: of the run.
        folder: `trackers` in the run folder.
        config: the dumped config.
        first_step: updates done before; steps after it that were logged earlier are trained again.
        logged_to: last step that was logged earlier; 0 for a new run.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    first_step: int
    logged_to: int

    def known_id(self, tracker: str) -> tuple[str, bool]:
        """Return the id of this run in a tracker, the same whenever it is resumed, and whether the tracker had it.

        It is in the file `<tracker>.id` of the folder. Raises OSError or RunError.
        """
        path = self.folder / f"{tracker}.id"
        if path.exists():
            return read_bounded(path, _ID_BYTES).decode(), True
        made = secrets.token_hex(4)
        make_folder(self.folder)
        write_atomically(path, made)
        return made, False


class Tracker(Protocol):
    """A run in one tracker. Any error ends the tracking of the run, not the run.

    Fields:
        place: where it logs to, or the command that shows it.
    """

    place: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite numbers by name; where the tracker can, they are on the disk before this returns."""
        ...

    def close(self, *, failed: bool) -> None:
        """Write what is left; `failed`: the run ends with an error."""
        ...


class Unlogged:
    """The steps of a run that a tracker without a way to take points back has not logged yet.

    A resumed run computes the steps after its checkpoint as before, bit for bit, so those that were logged are skipped.
    """

    def __init__(self, run: TrackedRun, *, is_resumed: bool):
        self._first_step, self._logged_to = run.first_step, run.logged_to if is_resumed else 0

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and not self._first_step < step <= self._logged_to
