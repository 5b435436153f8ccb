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

    from moezoo.core.huggingface.ledger import ledger_text
    from moezoo.core.progress import Pace
    from moezoo.core.runs.convert import convert
    from moezoo.core.runs.save import consolidate

    if whole:
        step, notes = consolidate(path, out)
        if as_json:
            click.echo(json.dumps({"format": "moezoo", "step": step, "notes": notes}, indent=2))
            return
        for note in notes:
            click.echo(note, err=True)
        click.echo(f"step {step}, weights and moments in whole files: {out}")
        return
    pace = Pace()
    interactive = sys.stderr.isatty()

    def show(what: str, done: int, total: int | None) -> None:
        if interactive:
            line = f"\r{what}: {done}/{total} parameters, eta {pace.eta(done, total)} "
            click.echo(line, nl=done == total, err=True)

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
