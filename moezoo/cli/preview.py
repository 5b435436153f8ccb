"""`moezoo preview`: the first examples of a config's data."""

from pathlib import Path

import click

from moezoo.cli.completion import PATH, complete_config
from moezoo.cli.options import set_option
from moezoo.cli.output import new_console, warn
from moezoo.core.errors import counted

_BEFORE, _AFTER = "«", "»"


@click.command()
@click.argument("config_path", metavar="CONFIG", type=PATH, shell_complete=complete_config)
@set_option
@click.option("--examples", default=3, show_default=True, type=click.IntRange(1), help="Examples of each source.")
def preview(config_path: Path, overrides: tuple[str, ...], examples: int) -> None:
    """Show the first examples of the data, with what is trained on.

    Tokens that are trained on are between « and »; the others are masked: the model reads them, and has no loss on
    them.
    """
    from rich.text import Text

    from moezoo.core.data.prepare import find_sources, make_tokenizer
    from moezoo.core.data.preview import first_examples
    from moezoo.core.runs.init_from import initial_tokenizer, load_resolved_config

    config, where = load_resolved_config(config_path, overrides), str(config_path)
    found = find_sources(config.data, where)
    tokenizer = initial_tokenizer(config) or make_tokenizer(config.data, found, where, None, warn)
    console = new_console()
    for source in found:
        for example in first_examples(source, tokenizer, examples):
            trained = int((example.ids >= 0).sum())
            line = f"{example.place}: {counted(len(example.ids), 'token')}, {trained} trained on"
            console.print(Text(line, "bold"), soft_wrap=True)
            text = Text()
            for part, is_trained in example.parts(tokenizer):
                text.append(f"{_BEFORE}{part}{_AFTER}" if is_trained else part, "green" if is_trained else "dim")
            console.print(text, soft_wrap=True)
