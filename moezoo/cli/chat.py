"""`moezoo chat`."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moezoo.cli.completion import PATH, complete_model
from moezoo.cli.options import (
    adapter_option,
    backend_option,
    overcommit_option,
    sampling_options,
    template_option,
    template_variables,
)
from moezoo.cli.output import warn
from moezoo.core.errors import MoezooError

if TYPE_CHECKING:
    from moezoo.api.conversation import Conversation

_TEMPERATURE = 0.8


@click.command()
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_model)
@click.option("--system", metavar="TEXT", help="System prompt.")
@template_option
@click.option("--stop", metavar="TEXT", multiple=True, help="End an answer at this text; repeatable.")
@adapter_option
@backend_option
@overcommit_option
@click.option("--compute", metavar="float32|bfloat16", help="Dtype of activations. Default: the model's own.")
@click.option("--max-length", type=click.IntRange(1), help="Maximum sequence length, which selects longrope's factors.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Maximum tokens of an answer. Default: the model's, or 1024."
)
@sampling_options
def chat(
    path: Path,
    system: str | None,
    template: tuple[str, ...],
    adapter: Path | None,
    backend: str | None,
    allow_overcommit: bool,
    compute: str | None,
    max_length: int | None,
    **options: Any,
) -> None:
    """Talk to a model, by its chat template.

    PATH is a run folder, a Hugging Face folder or a hub id. A line is a message. Ctrl-C stops an answer, Ctrl-D ends.
    The caches keep what was said: of each turn only the new tokens are read. Without a terminal, messages are the lines
    of standard input, and only answers are printed.
    """
    from moezoo.api import load_model
    from moezoo.api.conversation import Conversation

    variables = template_variables(template)
    model = load_model(path, backend, compute, max_length, adapter=adapter, allow_overcommit=allow_overcommit)
    warn(*model.problems)
    if options["temperature"] is None and model.generation.temperature is None:
        options["temperature"] = _TEMPERATURE
    conversation = Conversation(model, system=system, template=variables, **options)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  lines can be edited
        warn("Ctrl-C stops an answer, Ctrl-D ends.")
    for message in _messages("> " if is_terminal else ""):
        _answer(conversation, message, goes_on=is_terminal)


def _messages(prompt: str) -> Iterator[str]:
    while True:
        try:
            message = input(prompt)
        except EOFError:
            if prompt:
                click.echo()
            return
        except KeyboardInterrupt:
            if not prompt:
                raise
            click.echo()
            continue
        if message.strip():
            yield message


def _answer(conversation: "Conversation", message: str, *, goes_on: bool) -> None:
    try:
        with closing(conversation.say(message)) as pieces:
            for piece in until_interrupt(pieces):
                click.echo(piece, nl=False)
    except KeyboardInterrupt:  # a second one, before the next token
        pass
    except MoezooError as error:
        if not goes_on:
            raise
        warn(f"{type(error).__name__}: {error}")
        return
    click.echo()


def until_interrupt(pieces: Iterator[str]) -> Iterator[str]:
    """Yield pieces until Ctrl-C, which lets the token that is being computed end; a second one raises at once."""
    if threading.current_thread() is not threading.main_thread():
        yield from pieces
        return
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in pieces:
            yield piece
            if stopped.is_set():
                return
    finally:
        signal.signal(signal.SIGINT, before)
