"""`moezoo init`."""

from pathlib import Path

import click


@click.command("init")
@click.argument("name", metavar="NAME", type=Path)
@click.option("--from", "source", metavar="CONFIG", default="fables", help="Config to start from. Default: fables.")
def init_command(name: Path, source: str) -> None:
    """Write a commented config to start from, with its schema for editors.

    NAME is the new file, NAME.yaml. CONFIG is a YAML file or the name of a config that ships with moezoo: fables,
    moe_small, tiny/top_k.
    """
    from moezoo.core.config.new_config import new_config

    path, schema = new_config(name, source)
    click.echo(f"wrote {path}, and {schema} for completion in editors. Next: moezoo train {path}")
