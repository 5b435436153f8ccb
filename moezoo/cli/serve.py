"""`moezoo serve`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH, complete_model
from moezoo.cli.failures import describe_failure
from moezoo.cli.options import adapter_option, backend_option, overcommit_option
from moezoo.cli.output import warn

if TYPE_CHECKING:
    from moezoo.api import LoadedModel


@click.command("serve")
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_model)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 is a free one.")
@click.option("--name", metavar="TEXT", help="Name of the model in requests. Default: that of its folder.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="New tokens that a request may ask for, at most.",
)
@adapter_option
@backend_option
@overcommit_option
@click.option("--compute", metavar="float32|bfloat16", help="Dtype of activations. Default: the model's own.")
@click.option("--max-length", type=click.IntRange(1), help="Maximum sequence length, which selects longrope's factors.")
def serve_command(
    path: Path,
    host: str,
    port: int,
    name: str | None,
    max_tokens: int,
    adapter: Path | None,
    backend: str | None,
    allow_overcommit: bool,
    compute: str | None,
    max_length: int | None,
) -> None:
    """Serve a model by OpenAI's HTTP API.

    PATH is a run folder, a Hugging Face folder or a hub id. Served are /v1/chat/completions, /v1/completions,
    /v1/models and /health. Requests are answered one after another. There is no key and no encryption: keep the server
    to this machine, or put it behind one that has both. Ctrl-C stops it.
    """
    from moezoo.api import load_model
    from moezoo.server.run import serve

    named = name or (path.resolve().name if path.exists() else str(path))

    def load() -> "LoadedModel":
        return load_model(path, backend, compute, max_length, adapter=adapter, allow_overcommit=allow_overcommit)

    def ready(model: "LoadedModel", address: str) -> None:
        warn(*model.problems)
        click.echo(f"{named} at {address}; Ctrl-C stops")

    serve(
        load,
        named,
        host=host,
        port=port,
        max_tokens=max_tokens,
        on_ready=ready,
        on_failure=lambda error: warn(describe_failure(error)),
    )
