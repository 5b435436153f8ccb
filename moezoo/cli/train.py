"""`moezoo train` and `moezoo launch`."""

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH, complete_config
from moezoo.cli.data import prepare_with_progress
from moezoo.cli.options import backend_option, group_options, mesh_option, overcommit_option, replay_option, set_option
from moezoo.cli.output import continue_without_output, new_console, print_lines, warn
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console

    from moezoo.core.config.run_config import Config
    from moezoo.core.runs.run_folder import Run
    from moezoo.core.training.loop import TrainingResult


@click.command()
@click.argument("config_path", metavar="CONFIG", type=PATH, shell_complete=complete_config)
@backend_option
@click.option("--out", type=PATH, metavar="RUN", help="Run folder. Default: runs/<config name>.")
@set_option
@mesh_option
@click.option("--resume", is_flag=True, help="Resume the run in the run folder from its newest checkpoint.")
@replay_option
@overcommit_option
@click.option("--allow-changed-data", is_flag=True, help="Resume although the data changed since the run was started.")
@group_options
def train(
    config_path: Path,
    backend: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    mesh: str | None,
    resume: bool,
    replay: Path | None,
    allow_overcommit: bool,
    allow_changed_data: bool,
    group: ProcessGroup | None,
    startup_s: int,
) -> None:
    """Train a model from a YAML config.

    With --coordinator this is one of several JAX processes, all of which must be started with the same command.
    """
    from moezoo.api.ready_run import ready_run
    from moezoo.cli.progress import ConsoleReporter
    from moezoo.core.reports.model_page import training_header

    continue_without_output()
    console = new_console()
    ready = ready_run(
        config_path,
        prepare=partial(prepare_with_progress, console),
        backend=backend,
        out=out,
        overrides=overrides,
        mesh=mesh,
        resume=resume,
        replay=replay,
        allow_overcommit=allow_overcommit,
        allow_changed_data=allow_changed_data,
        group=group,
        startup_s=startup_s,
    )
    console.quiet = not ready.is_first
    warn(*ready.warnings)
    console.print(training_header(ready.config, ready.facts))
    warn(*ready.notes)
    print_lines(console, *ready.sources)
    result = ready.train(ConsoleReporter(console), shlex.join(["moezoo", *sys.argv[1:]]), exits=True)
    if ready.is_first:
        resume_command = _resume_command(config_path, backend, out, overrides, mesh, replay, allow_overcommit)
        _finish(console, ready.config, ready.run, ready.run.path, result, resume_command)


def _finish(
    console: "Console", config: "Config", run: "Run", path: Path, result: "TrainingResult", resume_command: str
) -> None:
    """Draw the picture of a run, and print its evaluation, or how to resume a run that was stopped."""
    from moezoo.core.reports.run_picture import draw_run
    from moezoo.core.training.evaluation import describe_evaluation

    if result.step == 0:
        print_lines(console, "stopped before the first step was done; nothing was saved.")
        return
    evaluation = result.evaluation
    optimum = evaluation.optimum if evaluation else None
    try:
        problems = draw_run(run.metrics_path, run.picture_path, optimum.entropy_rate if optimum else None)
    except KeyboardInterrupt:
        print_lines(console, f"step {result.step} is saved in {path}; its picture was not drawn.")
        raise
    print_lines(console, *problems)
    if not result.finished:
        stopped = f"stopped and saved after step {result.step} of {config.training.steps}. Resume with:"
        print_lines(console, stopped, f"  {resume_command}")
        return
    described = () if evaluation is None else (describe_evaluation(evaluation),)
    print_lines(console, *described, f"run folder: {path}  (picture: {run.picture_path})")


def _resume_command(
    config_path: Path,
    backend: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    mesh: str | None,
    replay: Path | None,
    allow_overcommit: bool,
) -> str:
    """Return the command that resumes a run, in as many processes as `moezoo launch` has started."""
    import os

    from moezoo.core.distributed.launch import NPROC

    launched = ["launch", "--nproc", os.environ[NPROC]] if NPROC in os.environ else []
    words = ["moezoo", *launched, "train", str(config_path)]
    words += ["--backend", backend] if backend else []
    words += ["--out", str(out)] if out else []
    for override in overrides:
        words += ["--set", override]
    words += ["--mesh", mesh] if mesh else []
    words += ["--replay", str(replay)] if replay else []
    words += ["--allow-overcommit"] if allow_overcommit else []
    return shlex.join([*words, "--resume"])


@click.command("launch", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", type=click.IntRange(1), required=True, metavar="N", help="Number of processes.")
@click.argument("words", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def launch_command(nproc: int, words: tuple[str, ...]) -> None:
    """Run `train` as N processes on this machine.

    Each process computes a part of every batch. For example: moezoo launch --nproc 2 train CONFIG --backend mlx, or
    --backend jax --mesh data=auto. If one process fails, all are ended.
    """
    from moezoo.backends import default_backend
    from moezoo.core.distributed.launch import launch

    continue_without_output()
    if words[0] != "train":
        raise RunError(
            f"launch runs `train` only, the one command that runs in several processes; got {words[0]!r}. "
            f"Run `moezoo {words[0]}` without launch."
        )
    backends = [
        word.partition("=")[2] or following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.partition("=")[0] == "--backend"
    ]
    launch(nproc, words, backends[-1] if backends else default_backend())
