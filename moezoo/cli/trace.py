"""`moezoo trace`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH, complete_model
from moezoo.cli.options import adapter_option, backend_option, json_option, overcommit_option
from moezoo.cli.output import new_console, print_json, print_lines, show_progress, warn
from moezoo.cli.trace_formats import FormatOptions, format_options
from moezoo.core.errors import DataError
from moezoo.core.progress import Pace

if TYPE_CHECKING:
    from rich.console import Console

    from moezoo.api import LoadedModel
    from moezoo.core.traces.trace_data import TracedData


@click.command("trace")
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_model)
@click.option("--out", required=True, type=PATH, metavar="FILE", help="File to write.")
@click.option("--data", multiple=True, metavar="[NAME=]FILE", help="Text or token ids; repeatable, a domain each.")
@click.option("--training-data", is_flag=True, help="Record the run's training data. Default: its validation data.")
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Record the first N tokens of each file.")
@click.option("--generate", type=click.IntRange(1), metavar="N", help="Continue each document by up to N tokens.")
@click.option("--inference", is_flag=True, help="Route as in generation. Default: as in training, without noise.")
@click.option("--sequence-length", type=click.IntRange(1), help="Sequence length. Default: the run's, or 512.")
@click.option("--batch-size", type=click.IntRange(1), help="Batch size. Default: the run's, less for large logits.")
@adapter_option
@backend_option
@overcommit_option
@json_option
@format_options
def trace(
    path: Path,
    out: Path,
    data: tuple[str, ...],
    training_data: bool,
    max_tokens: int | None,
    generate: int | None,
    inference: bool,
    sequence_length: int | None,
    batch_size: int | None,
    adapter: Path | None,
    backend: str | None,
    allow_overcommit: bool,
    as_json: bool,
    formats: FormatOptions,
) -> None:
    """Record which experts each token goes to, or convert such traces.

    PATH is a run folder, or with --data also a Hugging Face folder or hub id. With --from, PATH is a file of another
    program and --out a trace (.safetensors). With --to, PATH is a trace.
    """
    if formats:
        formats.convert(path, out)
        return
    from moezoo.api import load_model
    from moezoo.core.runs.run_folder import is_run
    from moezoo.core.traces.summary import summarize
    from moezoo.core.traces.trace_data import named_file

    console, files = new_console(), dict(map(named_file, data))
    if not data and not is_run(path):
        raise DataError(f"{path} is not a run folder, so it has no data; expected --data FILE, a text or token ids.")
    if files and training_data:
        raise DataError("--training-data is the run's own data, beside which --data has no place. Use one of them.")
    if len(files) < len(data):
        raise DataError(f"--data has one name twice; got {', '.join(data)}. Name each domain: --data NAME=FILE.")
    model = load_model(path, backend, adapter=adapter, allow_overcommit=allow_overcommit)
    warn(*model.problems)
    with show_progress(console, "recording ...", _tokens_line) as show:
        recorded = model.trace(
            files or _own_data(console, path, model, training=training_data),
            out,
            max_tokens=max_tokens,
            generate=generate or 0,
            sequence_length=sequence_length or (None if files else model.config.training.sequence_length),
            batch_size=batch_size or (None if files else model.config.training.batch_size),
            inference=inference,
            on_progress=show,
            on_message=warn,
        )
    summary = summarize(recorded)
    if as_json:
        print_json({"path": str(path), "out": str(out), **summary.to_dict()})
    else:
        print_lines(console, f"{out}: {summary.describe()}")


def _tokens_line(what: str, done: int, total: int | None, pace: Pace) -> str:
    unit = "documents" if what == "generating" else "tokens"
    return f"{what}: {done:,} of {total or 0:,} {unit}, eta {pace.eta(done, total)}"


def _own_data(console: "Console", path: Path, model: "LoadedModel", *, training: bool) -> "list[TracedData]":
    """Return a run's validation or training data, a domain for each source."""
    from moezoo.cli.data import prepare_with_progress
    from moezoo.core.runs.run_data import changed_data
    from moezoo.core.runs.run_folder import run_of
    from moezoo.core.traces.trace_data import TracedData

    prepared = prepare_with_progress(console, model.config, str(path), model.tokenizer, quiet=True)
    warn(*changed_data(run_of(path), prepared.summary))
    split = prepared.train if training else prepared.validation
    names = tuple(source.name for source in getattr(split, "sources", ())) or (split.source_names,)
    return [TracedData(names, split)]
