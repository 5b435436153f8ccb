"""`moezoo data`, and the preparation of a run's data with progress."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH, complete_dataset
from moezoo.cli.output import print_lines, show_progress, warn

if TYPE_CHECKING:
    from rich.console import Console

    from moezoo.core.config.run_config import Config
    from moezoo.core.data.prepare import PreparedData
    from moezoo.core.data.tokenizers import Tokenizer


@click.command()
@click.argument("name", required=False, shell_complete=complete_dataset)
@click.option("--file", type=PATH, help="Use this local copy instead of downloading; its checksum is verified.")
def data(name: str | None, file: Path | None) -> None:
    """Download a dataset and verify its checksum.

    Without NAME, list the available datasets.
    """
    from moezoo.core.data.datasets import fetch, list_recipes
    from moezoo.core.progress import bytes_on_stderr

    if name is None:
        for recipe in list_recipes():
            click.echo(f"{recipe.name:20} {recipe.characters:>10,} characters  {recipe.licence:28} {recipe.title}")
        return
    with bytes_on_stderr() as show:
        path = fetch(name, file, show)
    click.echo(path)


def prepare_with_progress(
    console: "Console", config: "Config", where: str, tokenizer: "Tokenizer | None", *, quiet: bool = False
) -> "PreparedData":
    """Prepare a config's data; the progress is shown unless `quiet`."""
    from moezoo.core.data.prepare import prepare_data
    from moezoo.core.progress import bytes_line

    if quiet:
        return prepare_data(
            config.data, config.training.sequence_length, where=where, tokenizer=tokenizer, on_message=warn
        )
    with show_progress(console, "preparing data ...", bytes_line) as show:
        return prepare_data(
            config.data,
            config.training.sequence_length,
            where=where,
            tokenizer=tokenizer,
            on_progress=show,
            on_message=lambda text: print_lines(console, text),
        )
