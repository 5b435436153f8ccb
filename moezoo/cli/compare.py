"""`moezoo compare`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.options import json_option, overcommit_option
from moezoo.cli.output import new_console, print_json, show_progress, warn
from moezoo.core.errors import DataError, SpecError
from moezoo.core.progress import Pace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moezoo.core.comparison.side import Side
    from moezoo.core.data.evaluation_windows import EvaluationBatch


@click.command("compare")
@click.argument("a", metavar="A", type=Path)
@click.argument("b", metavar="[B]", type=Path, required=False)
@click.option("--data", metavar="FILE", help="Text, JSON lines, or token ids (.npy, .bin). Default: the data of run A.")
@click.option("--backend", metavar="jax|mlx[,jax|mlx]", help="Backend of both, or of A and B: jax,mlx.")
@click.option(
    "--compute", metavar="DTYPE[,DTYPE]", help="Dtype of activations of both, or of A and B: float32,bfloat16."
)
@click.option("--adapter", type=Path, metavar="FOLDER", help="Adapter for B: a run, or a folder of mlx-lm or PEFT.")
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
    Without B, A is compared with itself on another backend, in another precision, or with an adapter.
    """
    from moezoo.core.comparison.compare import compare_models
    from moezoo.core.comparison.page import comparison_page
    from moezoo.core.comparison.verdict import comparison_json

    backends, computes = _pair(backend, "--backend"), _pair(compute, "--compute")
    if b is None and adapter is None and backends[0] == backends[1] and computes[0] == computes[1]:
        raise SpecError(
            "there is nothing to compare A with; got one model; expected B, an --adapter, or two values of --backend "
            "or --compute, e.g. --backend jax,mlx. Add one of them."
        )
    left = _load(a, backends[0], computes[0], None, allow_overcommit)
    right = _load(a if b is None else b, backends[1], computes[1], adapter, allow_overcommit)
    with show_progress(new_console(), "comparing ...", _line) as show:
        count, batches = _windows(a, left, right, data, sequence_length, batch_size, windows)
        report = compare_models(left, right, batches, count, show)
    if as_json:
        print_json(comparison_json(report))
    else:
        new_console().print(comparison_page(report))


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
    from moezoo.backends import default_backend
    from moezoo.core.comparison.side import Side

    loaded = load_model(path, backend, compute, adapter=adapter, allow_overcommit=allow_overcommit)
    warn(*loaded.problems)
    return Side(
        name=f"{path}{f' with {adapter}' if adapter else ''}{f', step {loaded.step}' if loaded.step else ''}",
        model=loaded.model,
        backend=backend or default_backend(),
        config=loaded.config,
        tokenizer=loaded.tokenizer,
        first_token=loaded.first_token if loaded.published else None,
        devices=loaded.devices,
        allow_overcommit=allow_overcommit,
    )


def _windows(
    path: Path,
    a: "Side",
    b: "Side",
    data: str | None,
    sequence_length: int | None,
    batch_size: int | None,
    windows: int | None,
) -> "tuple[int, Iterator[EvaluationBatch]]":
    """Return the windows of a file, or of the validation data of run A."""
    from moezoo.cli.data import prepare_with_progress
    from moezoo.core.comparison.compared_data import windows_of_file, windows_of_split
    from moezoo.core.comparison.specs import check_comparable
    from moezoo.core.runs.run_data import changed_data
    from moezoo.core.runs.run_folder import is_run, run_of

    if data is not None:
        return windows_of_file(
            a,
            b,
            data,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_windows=windows,
            on_message=warn,
        )
    if not is_run(path):
        raise DataError(f"{path} is not a run folder, so it has no data; expected --data FILE, a text or token ids.")
    check_comparable(a.model.spec, b.model.spec)
    prepared = prepare_with_progress(new_console(), a.config, str(path), a.tokenizer, quiet=True)
    warn(*changed_data(run_of(path), prepared.summary))
    length = sequence_length or a.config.training.sequence_length
    return windows_of_split(a, b, prepared.validation, length, batch_size=batch_size, max_windows=windows)
