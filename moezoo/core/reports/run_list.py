"""Report of `moezoo runs`: the runs below a folder, their state and their last losses."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from moezoo.core.errors import MoezooError, RunError
from moezoo.core.files import located
from moezoo.core.reports.text import new_table
from moezoo.core.runs.run_folder import CHECKPOINTS_FOLDER, Run, is_run, load_run_config
from moezoo.core.runs.run_lock import read_holder
from moezoo.core.runs.sessions import read_sessions
from moezoo.core.training.metric_columns import last_number, read_columns

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_FOLDERS = 10_000


@dataclass(frozen=True)
class ListedRun:
    """A run of the list; None is unknown.

    Fields:
        name: path below the listed folder.
        path: of its folder.
        state: running, finished, stopped, or damaged: its config cannot be read.
        step: last logged step.
        steps: that its config asks for.
        loss, validation: the last ones, nats per token.
        updated: local time of the last logged step.
        sessions: number of processes that trained it, one after the other.
        session: the last one, as `core.runs.sessions` records it.
    """

    name: str
    path: str
    state: str
    step: int | None
    steps: int | None
    loss: float | None
    validation: float | None
    updated: str | None
    sessions: int
    session: dict[str, Any] | None

    @property
    def cells(self) -> list[str]:
        """The texts of its row in the table."""
        step = "" if self.step is None else f"{self.step:,}" + ("" if self.steps is None else f" of {self.steps:,}")
        losses = ["" if value is None else f"{value:.4f}" for value in (self.loss, self.validation)]
        return [_printable(self.name), self.state, step, *losses, self.updated or ""]


@dataclass(frozen=True)
class RunList:
    """The runs below a folder, the last updated first, and a line for the user about each thing that was ignored."""

    folder: Path
    runs: Sequence[ListedRun]
    problems: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"folder": str(self.folder), "runs": [asdict(run) for run in self.runs]}

    def page(self) -> "RenderableType":
        """Return the table."""
        from rich.text import Text

        if not self.runs:
            return Text(f"no runs below {_printable(str(self.folder))}")
        table = new_table("run", "state", "step", "loss", "validation", "updated", right=(2, 3, 4))
        table.columns[0].overflow = "fold"
        for run in self.runs:
            table.add_row(*(Text(cell) for cell in run.cells))
        return table


def list_runs(folder: Path) -> RunList:
    """List the runs below a folder, or the folder itself if it is one. Links to folders are not followed.

    Raises RunError: no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"no such folder; got {located(folder)}; expected one with runs. Check the path.")
    problems: list[str] = []
    runs = [_listed(folder, path, problems) for path in _run_folders(folder, problems)]
    runs.sort(key=lambda run: run.updated or "", reverse=True)
    return RunList(folder, runs, problems)


def _run_folders(folder: Path, problems: list[str]) -> Iterator[Path]:
    """Yield the run folders below a folder. What is inside a run is not searched."""

    def unreadable(error: OSError) -> None:
        problems.append(f"{_printable(str(error.filename))} was left out: {(error.strerror or str(error)).lower()}")

    for number, (name, inner, files) in enumerate(os.walk(folder, onerror=unreadable)):
        if number == _MOST_FOLDERS:
            problems.append(f"only the first {_MOST_FOLDERS:,} folders below {folder} were searched")
            return
        inner[:] = sorted(each for each in inner if not each.startswith("."))
        if is_run(name) and ("metrics.jsonl" in files or CHECKPOINTS_FOLDER in inner):
            inner.clear()
            yield Path(name)


def _listed(folder: Path, path: Path, problems: list[str]) -> ListedRun:
    run, found, steps = Run(path), list[str](), None
    columns: dict[str, NDArray[Any]] = {}
    try:
        steps = load_run_config(path).training.steps
        columns = read_columns(run.metrics_path, found)
        state = ""
    except MoezooError as error:
        found.append(str(error).splitlines()[0])
        state = "damaged"
    sessions = read_sessions(path, found)
    step = int(columns["step"][-1]) if len(columns.get("step", ())) else None
    holder = read_holder(run.lock_path)
    if not state and holder is not None and holder.is_alive():
        state = "running"
    elif not state:
        state = "finished" if step is not None and steps is not None and step >= steps else "stopped"
    problems += [_printable(line) for line in found]
    name = path.resolve().name if path == folder else str(path.relative_to(folder))
    losses = last_number(columns, "loss"), last_number(columns, "validation_loss")
    last = sessions[-1] if sessions else None
    return ListedRun(name, str(path), state, step, steps, *losses, _updated(run.metrics_path), len(sessions), last)


def _updated(path: Path) -> str | None:
    try:
        return f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    except (OSError, ValueError, OverflowError):
        return None


def _printable(text: str) -> str:
    """Return text with characters that a terminal would obey, or not show, as escapes."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
