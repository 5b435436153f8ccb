"""`moezoo init`."""

from pathlib import Path

import click

from moezoo.cli.completion import PATH, complete_config


@click.command("init")
@click.argument("name", metavar="NAME", type=PATH)
@click.option(
    "--from",
    "source",
    metavar="CONFIG",
    default="fables",
    shell_complete=complete_config,
    help="Config to start from. Default: fables.",
)
def init_command(name: Path, source: str) -> None:
    """Write a commented config to start from, with its schema for editors.

    NAME is the new file, NAME.yaml. CONFIG is a YAML file or the name of a config that ships with moezoo: fables,
    moe_small, tiny/top_k.
    """
    from moezoo.core.config.new_config import new_config

    path, schema = new_config(name, source)
    click.echo(f"wrote {path}, and {schema} for completion in editors. Next: moezoo train {path}")
