"""`moezoo data`, and the preparation of a run's data with progress."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from moezoo.core.config.run_config import Config
    from moezoo.core.data.prepare import PreparedData
    from moezoo.core.data.tokenizers import Tokenizer


@click.command()
@click.argument("name", required=False)
@click.option("--file", type=Path, help="A copy that you already have; its checksum is verified.")
def data(name: str | None, file: Path | None) -> None:
    """Bring a dataset to this machine, verified; without NAME, list them."""
    from moezoo.core.data.datasets import fetch, list_recipes

    if name is None:
        for recipe in list_recipes():
            click.echo(f"{recipe.name:20} {recipe.characters:>10,} characters  {recipe.licence:28} {recipe.title}")
        return
    click.echo(fetch(name, file))


def prepare_with_progress(
    console: "Console", config: "Config", where: str, tokenizer: "Tokenizer | None", *, quiet: bool = False
) -> "PreparedData":
    from moezoo.core.data.prepare import prepare_data

    if quiet:
        return prepare_data(config.data, config.training.sequence_length, where=where, tokenizer=tokenizer)
    with console.status("preparing data ...") as status:

        def show(what: str, done: int, total: int | None) -> None:
            status.update(f"{what}: {done / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f} MB" if total else ""))

        return prepare_data(
            config.data, config.training.sequence_length, where=where, tokenizer=tokenizer, on_progress=show
        )
