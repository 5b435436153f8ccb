"""`moezoo convert`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.options import json_option
from moezoo.cli.output import print_json, warn

if TYPE_CHECKING:
    from moezoo.core.progress import Progress


@click.command("convert")
@click.argument("path", metavar="PATH", type=Path)
@click.argument("out", metavar="OUT", type=Path)
@click.option(
    "--whole", is_flag=True, help="Copy a run, its newest checkpoint merged into unsharded safetensors files."
)
@json_option
def convert_command(path: Path, out: Path, whole: bool, as_json: bool) -> None:
    """Convert between Hugging Face checkpoints and run folders.

    PATH is a run folder, a Hugging Face folder or a hub id; OUT is a new folder in the other format. Every tensor is
    accounted for; unchanged weights are converted back bit for bit.
    """
    from moezoo.core.huggingface.ledger import ledger_text
    from moezoo.core.runs.convert import convert

    if whole:
        _consolidate(path, out, as_json)
        return
    result = convert(path, out, _show_progress())
    if as_json:
        entries = [{**vars(entry), "shape": list(entry.shape)} for entry in result.ledger.entries]
        print_json({"format": result.format, "tensors": entries, "notes": result.notes})
        return
    click.echo(ledger_text(result.ledger))
    warn(*result.notes)
    counts = ", ".join(f"{count} {status}" for status, count in result.ledger.counts().items())
    click.echo(f"{counts}; none dropped. Written as {result.format}: {out}")


def _consolidate(path: Path, out: Path, as_json: bool) -> None:
    from moezoo.core.runs.save import consolidate

    step, notes = consolidate(path, out)
    if as_json:
        print_json({"format": "moezoo", "step": step, "notes": notes})
        return
    warn(*notes)
    click.echo(f"step {step}, weights and moments in unsharded files: {out}")


def _show_progress() -> "Progress":
    """Return a callback that shows progress and the remaining time in a terminal."""
    from moezoo.core.progress import Pace

    pace, interactive = Pace(), sys.stderr.isatty()

    def show(what: str, done: int, total: int | None) -> None:
        if interactive:
            line = f"\r{what}: {done}/{total} parameters, eta {pace.eta(done, total)} "
            click.echo(line, nl=done == total, err=True)

    return show
