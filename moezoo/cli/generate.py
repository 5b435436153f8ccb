"""`moezoo generate`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from moezoo.cli.completion import PATH, complete_file, complete_model
from moezoo.cli.options import (
    adapter_option,
    backend_option,
    overcommit_option,
    sampling_options,
    template_option,
    template_variables,
)
from moezoo.cli.output import warn
from moezoo.core.errors import DataError

if TYPE_CHECKING:
    from moezoo.api import LoadedModel
    from moezoo.core.data.tokenizers import IdsLike
    from moezoo.core.generation.loop import Continuation
    from moezoo.core.generation.prompts import Prompt

_TEMPERATURE, _NEW_TOKENS = 0.8, 256
_BATCH = 32
"""Sequences that are generated together, at most; but all samples of a prompt are."""


@click.command()
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_model)
@click.option("--prompt", "texts", metavar="TEXT|-", multiple=True, help="Text to continue, - for stdin; repeatable.")
@click.option(
    "--prompts",
    "file",
    metavar="FILE|-",
    shell_complete=complete_file,
    help="File of prompts: one a line, or JSON lines (.jsonl) with `prompt` or `messages`; - for lines of stdin.",
)
@click.option("--chat", is_flag=True, help="Apply the tokenizer's chat template to the prompt.")
@click.option("--system", metavar="TEXT", help="System prompt of a chat.")
@template_option
@click.option("--tokens", metavar="ID,ID,...", help="Token ids to continue instead of a text; prints token ids.")
@adapter_option
@backend_option
@overcommit_option
@click.option("--compute", metavar="float32|bfloat16", help="Dtype of activations. Default: the model's own.")
@click.option("--max-length", type=click.IntRange(1), help="Maximum sequence length, which selects longrope's factors.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Maximum number of new tokens. Default: the model's, or 256."
)
@sampling_options
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Number of samples per prompt.")
@click.option("--stop", metavar="TEXT", multiple=True, help="End at this text, which is not printed; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON per sample.")
def generate(
    path: Path,
    texts: tuple[str, ...],
    file: str | None,
    chat: bool,
    system: str | None,
    template: tuple[str, ...],
    tokens: str | None,
    adapter: Path | None,
    backend: str | None,
    allow_overcommit: bool,
    compute: str | None,
    max_length: int | None,
    max_new_tokens: int | None,
    samples: int,
    stop: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text from a model.

    PATH is a run folder, a Hugging Face folder or a hub id. Sampling options of a Hugging Face model default to its
    generation_config.json.
    """
    import numpy as np

    from moezoo.api import load_model
    from moezoo.core.generation.config import GenerationConfig
    from moezoo.core.generation.stop_strings import StopStrings

    GenerationConfig().options(**options)  # rejects bad options before the model is loaded
    StopStrings(stop)
    _check_input(texts, file, tokens, chat=chat, stop=stop)
    ids = None if tokens is None else _token_ids(tokens)
    variables = template_variables(template)
    prompts = _prompts(texts, file) if ids is None else []
    chat = chat or any(prompt.messages is not None for prompt in prompts)
    for name in (["--system"] if system is not None else []) + (["--set-template"] if variables else []):
        if not chat:
            raise DataError(f"{name} is for a chat; got no chat; expected --chat too, or --prompts with messages.")
    model = load_model(path, backend, compute, max_length, adapter=adapter, allow_overcommit=allow_overcommit)
    generation = model.generation
    warn(*model.problems)
    warn(*(f"{generation.where}: {name} is an unknown field and has no effect" for name in generation.unknown))
    requests = _encoded(model, prompts, chat, system, variables) if ids is None else [_id_request(ids)]
    longest, batch = max(len(request.row) for request in requests), max(1, _BATCH // samples)
    new_tokens = generation.new_tokens(max_new_tokens, longest, _NEW_TOKENS)
    warn(*model.check_generation(samples * min(batch, len(requests)), longest, new_tokens))
    if options["temperature"] is None and generation.temperature is None:
        options["temperature"] = _TEMPERATURE
    generation.options(**options)  # rejects bad settings of the model before anything is printed
    for start in range(0, len(requests), batch):
        some = [request for request in requests[start : start + batch] for _ in range(samples)]
        continuations = _continuations(model, some, chat, stop, has_text=ids is None)
        printer = _SamplePrinter(some, continuations, samples, as_json, streams=samples * len(requests) == 1)
        rows = [np.asarray(request.row) for request in some]
        model.generate(rows, max_new_tokens=new_tokens, on_tokens=printer.add, chat=chat, **options)
        printer.finish()
        options["seed"] += 1  # the same prompt gets other samples in another batch


class _Request(NamedTuple):
    """The tokens of a prompt, what its output starts with, the prompt as it was given, and one line that names it."""

    row: "Sequence[int] | IdsLike"
    lead: str
    prompt: Any
    title: str


def _check_input(
    texts: Sequence[str], file: str | None, tokens: str | None, *, chat: bool, stop: Sequence[str]
) -> None:
    if [bool(texts), file is not None, tokens is not None].count(True) != 1 or (chat and tokens is not None):
        raise DataError(
            "generate needs a prompt; expected --prompt TEXT or --prompts FILE, with or without --chat, or --tokens "
            "ID,ID,..."
        )
    if stop and tokens is not None:
        raise DataError("--stop is for text; got --tokens, which prints token ids; expected --prompt TEXT.")


def _id_request(ids: list[int]) -> _Request:
    shown = ",".join(map(str, ids))
    return _Request(ids, shown, ids, shown)


def _prompts(texts: Sequence[str], file: str | None) -> "list[Prompt]":
    from moezoo.core.generation.prompts import Prompt, prompts_in, read_prompts

    if file == "-":
        if not (prompts := prompts_in(_standard_input())):
            raise DataError("--prompts has none; got empty standard input; expected a prompt on each line.")
        return prompts
    if file is not None:
        return read_prompts(file)
    prompts = [Prompt(_standard_input().removesuffix("\n") if text == "-" else text) for text in texts]
    if not all(prompt.text for prompt in prompts):
        raise DataError("--prompt is empty; expected at least one token to continue. Give some text.")
    return prompts


def _standard_input() -> str:
    try:
        return str(sys.stdin.buffer.read(), "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8; got {error.reason}; expected text.") from None


def _continuations(
    model: "LoadedModel", requests: Sequence[_Request], chat: bool, stop: Sequence[str], *, has_text: bool
) -> "list[Continuation]":
    from moezoo.core.generation.loop import Continuation

    tokenizer, ends = model.tokenizer if has_text else None, model.end_tokens(chat)
    return [Continuation(tokenizer, request.row, ends, stop) for request in requests]


def _encoded(
    model: "LoadedModel", prompts: "Sequence[Prompt]", chat: bool, system: str | None, variables: dict[str, Any]
) -> list[_Request]:
    requests = []
    for prompt in prompts:
        given = prompt.text if prompt.messages is None else prompt.messages
        if chat:
            row = model.encode_chat(prompt.conversation(system), **variables)
            requests.append(_Request(row, "", given, prompt.title))
        else:
            requests.append(_Request(model.encode_prompt(prompt.text), prompt.text, given, prompt.title))
    if any(len(request.row) == 0 for request in requests):
        raise DataError("--prompt is empty; expected at least one token to continue. Give some text.")
    return requests


class _SamplePrinter:
    """Prints a single sample as it is generated, and several samples, or JSON, when all are finished.

    Args:
        requests: prompts, each as often as it has samples, and their continuations.
    """

    def __init__(
        self,
        requests: Sequence[_Request],
        continuations: "Sequence[Continuation]",
        samples: int,
        as_json: bool,
        *,
        streams: bool,
    ):
        self._requests, self._continuations, self._samples = requests, continuations, samples
        self._texts = [""] * len(requests)
        self._as_json, self._streams = as_json, streams and not as_json
        self._lead = requests[0].lead  # printed with the first token, so that no error about the prompt follows it

    def add(self, column: Any) -> list[bool]:
        for index, token in enumerate(column):
            piece = self._continuations[index].add(int(token))
            self._texts[index] += piece
            if self._streams:
                click.echo(self._lead + piece, nl=False)
                self._lead = ""
        return [continuation.ended for continuation in self._continuations]

    def finish(self) -> None:
        for index, (request, continuation) in enumerate(zip(self._requests, self._continuations, strict=True)):
            ending, number = continuation.finish(), index % self._samples
            text = self._texts[index] + ending
            if self._as_json:
                sample = {"prompt": request.prompt, "sample": number, "text": text}
                click.echo(json.dumps({**sample, "tokens": continuation.tokens, "ended_by": continuation.ended_by}))
            elif self._streams:
                click.echo(self._lead + ending)
            else:
                click.echo(f"--- sample {number + 1}: {request.title}\n{request.lead}{text}")


def _token_ids(text: str) -> list[int]:
    pieces = text.replace(",", " ").split()
    if not pieces or not all(piece.isascii() and piece.isdigit() for piece in pieces):
        raise DataError(f"--tokens is {text!r}; expected token ids, e.g. --tokens 1,2,3.")
    return [int(piece) for piece in pieces]
