"""`moezoo convert`."""

import sys
from pathlib import Path

import click

from moezoo.cli.options import json_option


@click.command("convert")
@click.argument("path", metavar="PATH", type=Path)
@click.argument("out", metavar="OUT", type=Path)
@click.option("--whole", is_flag=True, help="A run into a run: its newest checkpoint in whole safetensors files.")
@json_option
def convert_command(path: Path, out: Path, whole: bool, as_json: bool) -> None:
    """Turn a Hugging Face checkpoint into a run folder, or a run into a Hugging Face checkpoint.

    Every tensor is accounted for; unchanged weights come back bit for bit.
    """
    import json
    import time

    from moezoo.core.huggingface.ledger import ledger_text
    from moezoo.core.runs.convert import convert
    from moezoo.core.runs.save import copy_whole

    if whole:
        step, notes = copy_whole(path, out)
        if as_json:
            click.echo(json.dumps({"format": "moezoo", "step": step, "notes": notes}, indent=2))
            return
        for note in notes:
            click.echo(note, err=True)
        click.echo(f"step {step}, weights and moments in whole files: {out}")
        return
    started = time.monotonic()
    interactive = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        eta = (time.monotonic() - started) / done * (total - done)
        if interactive:
            click.echo(f"\r{done}/{total} parameters, eta {eta:.0f} s ", nl=done == total, err=True)

    result = convert(path, out, show)
    if as_json:
        entries = [{**vars(entry), "shape": list(entry.shape)} for entry in result.ledger.entries]
        click.echo(json.dumps({"format": result.format, "tensors": entries, "notes": result.notes}, indent=2))
        return
    click.echo(ledger_text(result.ledger))
    for note in result.notes:
        click.echo(note, err=True)
    counts = ", ".join(f"{count} {status}" for status, count in result.ledger.counts().items())
    click.echo(f"{counts}; none dropped. Written as {result.format}: {out}")
