"""`moezoo train` and `moezoo launch`."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.data import prepare_with_progress
from moezoo.cli.options import backend_option, group_options, mesh_option, overcommit_option, replay_option, set_option
from moezoo.cli.output import continue_without_output, new_console, print_lines, warn
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.errors import RunError, TokenizerError

if TYPE_CHECKING:
    from rich.console import Console

    from moezoo.core.config.run_config import Config
    from moezoo.core.data.prepare import PreparedData
    from moezoo.core.data.tokenizers import Tokenizer
    from moezoo.core.runs.run_folder import Run
    from moezoo.core.training.loop import TrainingResult
    from moezoo.core.training.reporter import Reporters


@click.command()
@click.argument("config_path", metavar="CONFIG", type=Path)
@backend_option
@click.option("--out", type=Path, metavar="RUN", help="Run folder. Default: runs/<config name>.")
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
    from moezoo.backends import load_backend
    from moezoo.core.config.vocabulary import with_vocab_size
    from moezoo.core.cost.fits import check_training
    from moezoo.core.data.load_tokenizer import tokenizer_notes
    from moezoo.core.distributed.processes import first_process_first
    from moezoo.core.reports.model_page import training_header
    from moezoo.core.runs.init_from import check_initial_weights, frozen_bytes, initial_tokenizer
    from moezoo.core.runs.run_data import check_data
    from moezoo.core.runs.run_folder import load_run_tokenizer, prepare_run
    from moezoo.core.traces.trace_file import open_trace
    from moezoo.core.training.loop import train as run_training

    continue_without_output()
    trace = open_trace(replay) if replay else None
    path = out or Path("runs") / config_path.stem
    config, resumed = _config(config_path, overrides, mesh, path if resume else None)
    loaded = load_backend(backend, config.mesh, group, startup_s)
    is_first = loaded.processes.is_first
    console = new_console(quiet=not is_first)
    tokenizer = load_run_tokenizer(path) if resumed else initial_tokenizer(config)
    given = (console, config, str(config_path), tokenizer)
    data = first_process_first(loaded, partial(_prepared, *given, resumed=resumed))
    config = with_vocab_size(config, data.tokenizer.vocab_size, str(config_path))
    if not resumed:
        check_initial_weights(config)
    if config.mesh.is_one_device:  # then each process has all weights and an equal part of every micro-batch
        loaded.processes.share(config.training.batch_size // config.training.gradient_accumulation)
    frozen = frozen_bytes(config, path if resumed else None)
    warnings = check_training(config, loaded.devices(), frozen_bytes=frozen, allow_overcommit=allow_overcommit)
    run = first_process_first(loaded, lambda: prepare_run(path, config, resume=resume))
    changes = check_data(path, data.summary, allow_changed=allow_changed_data) if resumed else []
    warn(*([*warnings, *changes] if is_first else []))
    facts = {"backend": loaded.name, **loaded.facts(), **({"replay": str(replay)} if replay else {}), "run": str(path)}
    console.print(training_header(config, facts))
    warn(*(tokenizer_notes(data.tokenizer) if is_first and not resumed else []))
    tokens = math.prod((config.training.steps, config.training.batch_size, config.training.sequence_length))
    print_lines(console, *(source.describe(tokens) for source in data.summary))
    reporter = _reporter(console, config, run) if is_first else None
    result = run_training(config, data, loaded, run, reporter=reporter, replay=trace, exits=True)
    loaded.leave()
    if is_first:
        resume_command = _resume_command(config_path, backend, out, overrides, mesh, replay, allow_overcommit)
        _finish(console, config, run, path, result, resume_command)


def _reporter(console: "Console", config: "Config", run: "Run") -> "Reporters":
    """Return the reporters of the console and of the config's trackers."""
    from moezoo.cli.progress import ConsoleReporter
    from moezoo.core.trackers.reporter import tracker_reporters
    from moezoo.core.training.reporter import Reporters

    shown = ConsoleReporter(console)
    return Reporters(shown, *tracker_reporters(config, run, shown.message))


def _prepared(
    console: "Console", config: "Config", where: str, tokenizer: "Tokenizer | None", *, resumed: bool
) -> "PreparedData":
    """Prepare the data; characters that the tokenizer of a run to resume lacks mean that the data has changed."""
    from moezoo.core.data.tokenizers import CharacterTokenizer
    from moezoo.core.runs.run_data import vocabulary_error

    try:
        return prepare_with_progress(console, config, where, tokenizer)
    except TokenizerError as error:
        raise vocabulary_error(error) if resumed and isinstance(tokenizer, CharacterTokenizer) else error from None


def _config(
    config_path: Path, overrides: tuple[str, ...], mesh: str | None, resumed_run: Path | None
) -> tuple["Config", bool]:
    """Return the config with its overrides, and True if it resumes a run, whose own config then fills it in."""
    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.runs.init_from import load_resolved_config
    from moezoo.core.runs.run_folder import is_run, load_run_config
    from moezoo.core.trackers.reporter import check_installed

    resumed = resumed_run is not None and is_run(resumed_run)
    before = load_run_config(resumed_run) if resumed_run is not None and resumed else None
    config = load_resolved_config(config_path, overrides, resumed=before)
    check_installed(config.trackers)
    return config if mesh is None else config.model_copy(update={"mesh": load_mesh(mesh)}), resumed


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
    import shlex

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
