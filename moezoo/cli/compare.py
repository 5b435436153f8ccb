"""`moezoo compare`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moezoo.cli.completion import PATH, complete_file, complete_model
from moezoo.cli.options import json_option, overcommit_option
from moezoo.cli.output import new_console, print_json, show_progress, warn
from moezoo.core.errors import DataError, SpecError
from moezoo.core.progress import Pace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from moezoo.core.comparison.side import Side
    from moezoo.core.data.evaluation_windows import EvaluationBatch
    from moezoo.core.progress import Progress


@click.command("compare")
@click.argument("a", metavar="A", type=PATH, shell_complete=complete_model)
@click.argument("b", metavar="[B]", type=PATH, required=False, shell_complete=complete_model)
@click.option(
    "--data",
    metavar="FILE",
    shell_complete=complete_file,
    help="Text, JSON lines, or token ids (.npy, .bin). Default: the data of run A; the tokens of a trace.",
)
@click.option("--backend", metavar="jax|mlx[,jax|mlx]", help="Backend of both, or of A and B: jax,mlx.")
@click.option(
    "--compute", metavar="DTYPE[,DTYPE]", help="Dtype of activations of both, or of A and B: float32,bfloat16."
)
@click.option("--adapter", type=PATH, metavar="FOLDER", help="Adapter for B: a run, or a folder of mlx-lm or PEFT.")
@click.option("--sequence-length", type=click.IntRange(1), help="Sequence length. Default: that of run A, or 512.")
@click.option("--batch-size", type=click.IntRange(1), help="Batch size. Default: run A's, less for large outputs.")
@click.option("--windows", type=click.IntRange(1), metavar="N", help="Compare N windows, spread evenly. Default: all.")
@overcommit_option
@json_option
def compare(
    a: Path,
    b: Path | None,
    data: str | None,
    backend: str | None,
    compute: str | None,
    adapter: Path | None,
    sequence_length: int | None,
    batch_size: int | None,
    windows: int | None,
    allow_overcommit: bool,
    as_json: bool,
) -> None:
    """Compare two models, and say whether they differ by routing or arithmetic.

    A and B are run folders, checkpoints of runs (RUN/checkpoints/step_00001000), Hugging Face folders or hub ids.
    Without B, A is compared with itself on another backend, in another precision, or with an adapter. B may also be a
    routing trace (.safetensors): then routing alone is compared, and replayed in A, on the tokens of the trace.
    """
    if a.suffix == ".safetensors" and a.is_file():
        raise SpecError(
            f"A is {a}, a file; expected a model: a run folder, a Hugging Face folder or a hub id. A trace can be B. "
            "Without a model use `moezoo analyze` or `moezoo explore`."
        )
    sides = list(zip(_pair(backend, "--backend"), _pair(compute, "--compute"), strict=True))
    traced = b is not None and b.suffix == ".safetensors"
    if sides[0] == sides[1] and adapter is None and b is None:
        raise SpecError(
            "there is nothing to compare A with; got one model; expected B, an --adapter, or two values of --backend "
            "or --compute, e.g. --backend jax,mlx. Add one of them."
        )
    if traced and (sides[0] != sides[1] or adapter is not None):
        raise SpecError(f"{b} is a trace, which has no --adapter, --backend or --compute of its own. Remove them.")
    left = _load(a, *sides[0], None, allow_overcommit)
    right = left if b is not None and traced else _load(b or a, *sides[1], adapter, allow_overcommit)
    sizes = {"sequence_length": sequence_length, "batch_size": batch_size, "max_windows": windows}
    with show_progress(new_console(), "comparing ...", _line) as show:
        if b is not None and traced:
            result, page = _compared_with_trace(a, left, b, data, sizes, show)
        else:
            result, page = _compared(a, left, right, data, sizes, show)
    if as_json:
        print_json(result)
    else:
        new_console().print(page)


def _compared(
    path: Path, a: "Side", b: "Side", data: str | None, sizes: "dict[str, int | None]", show: "Progress"
) -> "tuple[dict[str, Any], RenderableType]":
    """Return the comparison of two models, as data and as a page."""
    from moezoo.core.comparison.compare import compare_models
    from moezoo.core.comparison.result import with_verdict

    compared = with_verdict(compare_models(a, b, *_windows(path, a, b, data, sizes), show))
    return compared.to_json(), compared.page()


def _compared_with_trace(
    path: Path, a: "Side", file: Path, data: str | None, sizes: "dict[str, int | None]", show: "Progress"
) -> "tuple[dict[str, Any], RenderableType]":
    """Return the comparison of a model and a trace: on a file, or on the tokens of the trace."""
    from moezoo.core.comparison.compare_trace import batches_of_data, compare_trace, windows_of_text, windows_of_trace
    from moezoo.core.comparison.page import trace_page
    from moezoo.core.traces.replay import Replay
    from moezoo.core.traces.trace_data import named_file
    from moezoo.core.traces.trace_file import open_trace

    trace = open_trace(file)
    replay = Replay(trace, a.model.spec, None if data is None else [named_file(data)[0]])
    length, most = sizes["sequence_length"], sizes["max_windows"]
    with tempfile.TemporaryDirectory() as folder:
        if data is not None:
            count, windows = _windows(path, a, a, data, sizes)
            batches = batches_of_data(windows, replay)
        elif trace.info.written_by == "moezoo":
            count, batches = windows_of_text(a, trace, Path(folder), length, sizes["batch_size"], most)
        else:
            count, batches = windows_of_trace(a, trace, replay, length, most)
        report = compare_trace(a, trace, count, batches, show)
    return report.to_json(), trace_page(report)


def _pair(value: str | None, option: str) -> tuple[str | None, str | None]:
    """Return the values of an option for A and for B."""
    values = [] if value is None else value.split(",")
    if len(values) > 2:
        raise SpecError(f"{option} is {value!r:.80}; expected one value, or two with a comma, for A and B.")
    return (values[0], values[-1]) if values else (None, None)


def _line(what: str, done: int, total: int | None, pace: Pace) -> str:
    return f"{what}: {done:,} of {total or 0:,}, eta {pace.eta(done, total)}"


def _load(path: Path, backend: str | None, compute: str | None, adapter: Path | None, allow_overcommit: bool) -> "Side":
    from moezoo.api import load_model
    from moezoo.core.comparison.side import side_of

    loaded = load_model(path, backend, compute, adapter=adapter, allow_overcommit=allow_overcommit)
    warn(*loaded.problems)
    return side_of(loaded, str(path) if adapter is None else f"{path} with {adapter}")


def _windows(
    path: Path, a: "Side", b: "Side", data: str | None, sizes: "dict[str, int | None]"
) -> "tuple[int, Iterator[EvaluationBatch]]":
    """Return the windows of a file, or of the validation data of run A."""
    from moezoo.cli.data import prepare_with_progress
    from moezoo.core.comparison.compared_data import windows_of_file, windows_of_split
    from moezoo.core.comparison.specs import check_comparable
    from moezoo.core.runs.run_data import changed_data
    from moezoo.core.runs.run_folder import is_run, run_of

    if data is not None:
        return windows_of_file(a, b, data, **sizes, on_message=warn)
    if not is_run(path):
        raise DataError(f"{path} is not a run folder, so it has no data; expected --data FILE, a text or token ids.")
    check_comparable(a.model.spec, b.model.spec)
    prepared = prepare_with_progress(new_console(), a.config, str(path), a.tokenizer, quiet=True)
    warn(*changed_data(run_of(path), prepared.summary))
    length = sizes["sequence_length"] or a.config.training.sequence_length
    batch_size, windows = sizes["batch_size"], sizes["max_windows"]
    return windows_of_split(
        a, b, prepared.validation, sequence_length=length, batch_size=batch_size, max_windows=windows
    )
