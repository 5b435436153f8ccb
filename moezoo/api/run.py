"""Runs as Python objects: train one, read its metrics, load its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moezoo.api.load import load_model
from moezoo.api.loaded_model import LoadedModel
from moezoo.api.ready_run import AnyConfig, quiet_data, ready_run
from moezoo.core.backend import Backend
from moezoo.core.config.run_config import Config
from moezoo.core.reports.model_words import model_in_brief
from moezoo.core.reports.run_picture import draw_run
from moezoo.core.runs.run_folder import load_run_config, open_run
from moezoo.core.runs.sessions import read_sessions
from moezoo.core.tokens import Column
from moezoo.core.training.evaluation import Evaluation, describe_evaluation
from moezoo.core.training.metric_columns import last_number, read_columns
from moezoo.core.training.progress_lines import python_reporter
from moezoo.core.training.reporter import Reporter, Reporters, SilentReporter


class Run:
    """A run folder. `moezoo.train` returns one, and this opens one that exists, also while it is trained.

    >>> run = moezoo.Run("runs/owls")
    >>> run.metrics["loss"].shape
    (8,)
    >>> model = run.load()

    Attributes:
        path: the folder.
        evaluation: of the final validation, if `moezoo.train` has just done it; else None.
        problems: one-line warnings about damaged lines of the file that was read last.
    """

    def __init__(self, path: str | Path, *, evaluation: Evaluation | None = None):
        """Open a run folder. Raises RunError: it is not one."""
        self._files = open_run(path)
        self.path, self.evaluation = self._files.path, evaluation
        self.problems: list[str] = []

    def __repr__(self) -> str:
        metrics = self.metrics
        last = {name: last_number(metrics, name) for name in ("loss", "validation_loss")}
        shown = [f"{name} {value:.4f}" for name, value in last.items() if value is not None]
        step = f"step {metrics['step'][-1]}" if len(metrics["step"]) else "no step"
        return f"<{type(self).__name__} {self.path}: {', '.join([step, *shown])}>"

    @property
    def config(self) -> Config:
        """The resolved config. Raises RunError or SpecError: it is damaged."""
        return load_run_config(self.path)

    @property
    def metrics(self) -> Mapping[str, Column]:
        """The numbers of metrics.jsonl as columns [n] by name, read anew each time; a row per logged step.

        `step` (int64), `tokens`, `loss`, `cross_entropy`, `validation_loss` and the others, float64, NaN in the rows
        that do not have the number: most steps have no validation.

        Raises RunError: the file cannot be read.
        """
        self.problems = []
        return read_columns(self._files.metrics_path, self.problems)

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """The processes that trained the run: command, versions, commit, devices, data and times of each."""
        self.problems = []
        return read_sessions(self.path, self.problems)

    @property
    def picture(self) -> Path:
        """The path of the picture of loss and expert load."""
        return self._files.picture_path

    def load(self, backend: str | Backend | None = None, **options: Any) -> LoadedModel:
        """Load the model of the newest checkpoint. Arguments and errors: as `moezoo.load`."""
        return load_model(self.path, backend, **options)


def train_run(
    config: AnyConfig,
    *,
    backend: str | Backend | None = None,
    out: str | Path | None = None,
    overrides: str | Sequence[str] = (),
    mesh: str | None = None,
    resume: bool = False,
    replay: str | Path | None = None,
    progress: bool = True,
    reporter: Reporter | None = None,
    allow_overcommit: bool = False,
    allow_changed_data: bool = False,
) -> Run:
    """Train a model: the implementation of `moezoo.train`."""
    overrides = [overrides] if isinstance(overrides, str) else overrides
    shown: Reporter = python_reporter() if progress else SilentReporter()
    ready = ready_run(
        config,
        prepare=quiet_data(shown.message),
        backend=backend,
        out=out,
        overrides=overrides,
        mesh=mesh,
        resume=resume,
        replay=replay,
        allow_overcommit=allow_overcommit,
        allow_changed_data=allow_changed_data,
    )
    on = f"{ready.backend.name} ({ready.facts['device']})" if "device" in ready.facts else ready.backend.name
    for line in (f"{model_in_brief(ready.config.model)}; {on}", *ready.warnings, *ready.notes, *ready.sources):
        shown.message(line)
    named = repr(str(config)) if isinstance(config, str | Path) else "config"
    call = f"moezoo.train({named}, overrides={list(overrides)!r}, resume={resume})"
    result = ready.train(shown if reporter is None else Reporters(shown, reporter), call)
    if result.step == 0:
        raise KeyboardInterrupt("stopped before the first step was done; nothing was saved")
    run, evaluation = Run(ready.run.path, evaluation=result.evaluation), result.evaluation
    optimum = None if evaluation is None or evaluation.optimum is None else evaluation.optimum.entropy_rate
    for line in draw_run(ready.run.metrics_path, run.picture, optimum):
        shown.message(line)
    if not result.finished:
        shown.message(f"stopped and saved after step {result.step} of {ready.config.training.steps}")
    elif evaluation is not None:
        shown.message(describe_evaluation(evaluation))
    return run
