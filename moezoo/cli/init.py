"""`moezoo init`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH, complete_config

if TYPE_CHECKING:
    from moezoo.core.spec import ModelSpec


@click.command("init")
@click.argument("name", metavar="NAME", type=PATH)
@click.option(
    "--from",
    "source",
    metavar="CONFIG|MODEL",
    default="fables",
    shell_complete=complete_config,
    help="Config or published model to start from. Default: fables.",
)
def init_command(name: Path, source: str) -> None:
    """Write a commented config to start from, with its schema for editors.

    NAME is the new file, NAME.yaml. CONFIG is a YAML file, the name of a config that ships with moezoo (fables,
    moe_small, qwen3_30b_a3b), or a Hugging Face folder or hub id, whose model is written as a config.
    """
    from moezoo.core.config.new_config import new_config

    path, schema = new_config(name, source, _model(source))
    click.echo(f"wrote {path}, and {schema} for completion in editors. Next: moezoo train {path}")


def _model(source: str) -> "ModelSpec | None":
    """Return the model of a Hugging Face checkpoint; None for a config."""
    from moezoo.core.huggingface.checkpoint import describe_checkpoint
    from moezoo.core.runs.open import checkpoint_folder, is_config

    if is_config(source) or not (Path(source).exists() or "/" in source):  # an unknown name is an unknown config
        return None
    return describe_checkpoint(checkpoint_folder(source, weights=False)).spec
