"""`moezoo train` and `moezoo launch`."""

from pathlib import Path

import click

from moezoo.cli.data import prepare_with_progress
from moezoo.cli.options import backend_option, group_options, mesh_option, new_console, set_option
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.errors import RunError


@click.command()
@click.argument("config_path", metavar="CONFIG", type=Path)
@backend_option
@click.option("--out", type=Path, metavar="RUN", help="Run folder. Default: runs/<config name>.")
@set_option
@mesh_option
@click.option("--resume", is_flag=True, help="Go on with the run in the run folder.")
@group_options
def train(
    config_path: Path,
    backend: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    mesh: str | None,
    resume: bool,
    group: ProcessGroup | None,
) -> None:
    """Train a model from a YAML config.

    With --coordinator as one of several JAX processes, all of which are given the same command.
    """
    from moezoo.backends import load_backend
    from moezoo.cli.progress import ConsoleReporter
    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.config.run_config import load_config
    from moezoo.core.config.vocabulary import with_vocab_size
    from moezoo.core.data.tokenizers import load_tokenizer
    from moezoo.core.distributed.processes import first_then_others
    from moezoo.core.reports.model_page import header
    from moezoo.core.reports.run_picture import draw_run
    from moezoo.core.runs.init_from import check_start, initial_tokenizer, load_resolved_config
    from moezoo.core.runs.run_folder import create_run, is_run, open_run
    from moezoo.core.training.evaluation import describe_evaluation
    from moezoo.core.training.loop import train as run_training

    path = out or Path("runs") / config_path.stem
    begun = load_config(path / "config.yaml") if resume and is_run(path) else None
    config = load_resolved_config(config_path, overrides, begun=begun)
    if mesh is not None:
        config = config.model_copy(update={"mesh": load_mesh(mesh)})
    realized = load_backend(backend, config.mesh, group)
    is_first = realized.processes.is_first
    console = new_console(quiet=not is_first)
    known = initial_tokenizer(config) if begun is None else load_tokenizer(path)
    data = first_then_others(realized, lambda: prepare_with_progress(console, config, str(config_path), known))
    config = with_vocab_size(config, data.tokenizer.vocab_size, str(config_path))
    if begun is None:
        check_start(config)
    run = first_then_others(
        realized,
        lambda: create_run(path, config, data.tokenizer, resume=resume) if is_first else open_run(path),
    )
    console.print(header(config, {"backend": realized.name, **realized.facts(), "run": str(path)}))
    for row in data.summary:
        console.print(
            f"{row.source}: {row.train_tokens:,} training and {row.validation_tokens:,} validation tokens",
            highlight=False,
        )
    result = run_training(config, data, realized, run, reporter=ConsoleReporter(console))
    realized.leave()
    if not is_first:
        return
    optimum = result.evaluation.optimum if result.evaluation else None
    draw_run(run.metrics_path, run.picture_path, optimum.entropy_rate if optimum else None)
    if result.evaluation is None:
        console.print(
            f"stopped and saved after step {result.step} of {config.training.steps}. Go on with:\n"
            f"  {_again(config_path, backend, out, overrides, mesh)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        return
    console.print(describe_evaluation(result.evaluation), highlight=False, soft_wrap=True, markup=False)
    console.print(f"run folder: {path}  (picture: {run.picture_path})", highlight=False, soft_wrap=True, markup=False)


@click.command("launch", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", type=click.IntRange(1), required=True, metavar="N", help="How many processes.")
@click.argument("words", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def launch_command(nproc: int, words: tuple[str, ...]) -> None:
    """Run `train` as N processes on this machine, each with a part of every batch.

    For example: moezoo launch --nproc 2 train CONFIG --backend mlx, or --backend jax --mesh data=auto. When one
    process ends with an error, all do.
    """
    from moezoo.backends import default_backend
    from moezoo.core.distributed.launch import launch

    if words[0] != "train":
        raise RunError(f"launch runs `train`, which alone divides its work; got {words[0]!r}. Run that by itself.")
    given = [
        word.partition("=")[2] or following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.partition("=")[0] == "--backend"
    ]
    launch(nproc, words, given[-1] if given else default_backend())


def _again(
    config_path: Path, backend: str | None, out: Path | None, overrides: tuple[str, ...], mesh: str | None
) -> str:
    """The command that resumes."""
    import shlex

    words = ["moezoo", "train", str(config_path)]
    words += ["--backend", backend] if backend else []
    words += ["--out", str(out)] if out else []
    for override in overrides:
        words += ["--set", override]
    words += ["--mesh", mesh] if mesh else []
    return shlex.join([*words, "--resume"])
