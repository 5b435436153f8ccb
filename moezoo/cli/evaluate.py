"""`moezoo eval`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.data import prepare_with_progress
from moezoo.cli.options import adapter_option, backend_option, json_option, overcommit_option
from moezoo.cli.output import new_console, print_json, print_lines, show_progress, warn
from moezoo.core.errors import DataError
from moezoo.core.progress import Pace

if TYPE_CHECKING:
    from rich.console import Console

    from moezoo.api import LoadedModel
    from moezoo.core.progress import Progress
    from moezoo.core.training.evaluation import Evaluation


@click.command("eval")
@click.argument("path", metavar="PATH", type=Path)
@click.option("--data", metavar="FILE", help="Text, JSON lines, or token ids (.npy, .bin). Default: the run's data.")
@click.option("--sequence-length", type=click.IntRange(1), help="Sequence length. Default: the run's, or 512.")
@click.option("--batch-size", type=click.IntRange(1), help="Batch size. Default: the run's, less for large logits.")
@click.option("--windows", type=click.IntRange(1), metavar="N", help="Score N windows, spread evenly. Default: all.")
@adapter_option
@backend_option
@overcommit_option
@json_option
def evaluate(
    path: Path,
    data: str | None,
    sequence_length: int | None,
    batch_size: int | None,
    windows: int | None,
    adapter: Path | None,
    backend: str | None,
    allow_overcommit: bool,
    as_json: bool,
) -> None:
    """Evaluate loss, bits per byte and expert load on held-out data.

    PATH is a run folder, or one of its checkpoints; with --data also a Hugging Face folder or hub id.
    """
    from moezoo.api import evaluate_file, load_model
    from moezoo.core.runs.run_folder import is_run
    from moezoo.core.training.evaluation import describe_evaluation, describe_routing

    console = new_console()
    if data is None and not is_run(path):
        raise DataError(f"{path} is not a run folder, so it has no data; expected --data FILE, a text or token ids.")
    model = load_model(path, backend, adapter=adapter, allow_overcommit=allow_overcommit)
    warn(*model.problems)
    with show_progress(console, "evaluating ...", _windows_line) as show:
        if data is not None:
            result = evaluate_file(
                model,
                data,
                sequence_length=sequence_length,
                batch_size=batch_size,
                max_windows=windows,
                on_progress=show,
                on_message=warn,
            )
        else:
            result = _evaluate_run(console, path, model, sequence_length, batch_size, windows, show)
    if as_json:
        print_json({"path": str(path), "data": data, "step": model.step, **result.to_dict()})
        return
    what = f"step {model.step}" if data is None else data
    print_lines(console, f"{what}: {describe_evaluation(result)}", *describe_routing(result))


def _windows_line(what: str, done: int, total: int | None, pace: Pace) -> str:
    return f"{what}: {done:,} of {total or 0:,} windows, eta {pace.eta(done, total)}"


def _evaluate_run(
    console: "Console",
    path: Path,
    model: "LoadedModel",
    sequence_length: int | None,
    batch_size: int | None,
    windows: int | None,
    show: "Progress",
) -> "Evaluation":
    """Evaluate a run on its own validation data."""
    from moezoo.core.runs.run_data import changed_data
    from moezoo.core.runs.run_folder import run_of
    from moezoo.core.training.evaluation import evaluate, known_grammar

    config = model.config
    prepared = prepare_with_progress(console, config, str(path), model.tokenizer, quiet=True)
    warn(*changed_data(run_of(path), prepared.summary))
    length, batch = sequence_length or config.training.sequence_length, batch_size or config.training.batch_size
    model.check_scoring(prepared.validation.num_tokens, batch, length)
    return evaluate(
        model.model,
        prepared.validation,
        model.tokenizer,
        sequence_length=length,
        batch_size=batch,
        max_windows=windows,
        grammar=known_grammar(config.data),
        on_progress=show,
    )
