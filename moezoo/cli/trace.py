"""`moezoo trace`."""

from pathlib import Path

import click

from moezoo.cli.trace_formats import FormatOptions, format_options
from moezoo.core.errors import DataError


@click.command("trace")
@click.argument("path", metavar="PATH", type=Path)
@click.option("--out", required=True, type=Path, metavar="FILE", help="File to write.")
@format_options
def trace(path: Path, out: Path, formats: FormatOptions) -> None:
    """Convert routing traces from and to the formats of other programs.

    With --from, PATH is a file of another program and --out a trace (.safetensors). With --to, PATH is a trace.
    """
    if not formats:
        raise DataError("moezoo trace converts; got neither --from nor --to. Add one of them.")
    formats.convert(path, out)
