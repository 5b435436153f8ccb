"""`moezoo convert`."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from moezoo.cli.options import json_option
from moezoo.cli.output import print_json, warn


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
        _copy_whole(path, out, as_json)
        return
    result = convert(path, out, _show_progress(time.monotonic()))
    if as_json:
        entries = [{**vars(entry), "shape": list(entry.shape)} for entry in result.ledger.entries]
        print_json({"format": result.format, "tensors": entries, "notes": result.notes})
        return
    click.echo(ledger_text(result.ledger))
    warn(*result.notes)
    counts = ", ".join(f"{count} {status}" for status, count in result.ledger.counts().items())
    click.echo(f"{counts}; none dropped. Written as {result.format}: {out}")


def _copy_whole(path: Path, out: Path, as_json: bool) -> None:
    from moezoo.core.runs.save import copy_whole

    step, notes = copy_whole(path, out)
    if as_json:
        print_json({"format": "moezoo", "step": step, "notes": notes})
        return
    warn(*notes)
    click.echo(f"step {step}, weights and moments in unsharded files: {out}")


def _show_progress(started: float) -> Callable[[int, int], None]:
    """Return a callback that shows progress and the remaining time in a terminal."""
    interactive = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        eta = (time.monotonic() - started) / done * (total - done)
        if interactive:
            click.echo(f"\r{done}/{total} parameters, eta {eta:.0f} s ", nl=done == total, err=True)

    return show
