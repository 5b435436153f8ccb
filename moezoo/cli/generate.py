"""`moezoo generate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moezoo.cli.options import adapter_option, backend_option, overcommit_option
from moezoo.cli.output import warn
from moezoo.core.errors import DataError

if TYPE_CHECKING:
    from moezoo.api import LoadedModel
    from moezoo.core.data.tokenizers import IdsLike, Tokenizer

_TEMPERATURE, _NEW_TOKENS = 0.8, 256


@click.command()
@click.argument("path", metavar="PATH", type=Path)
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="Text to continue; repeatable.")
@click.option("--chat", is_flag=True, help="Apply the tokenizer's chat template to the prompt.")
@click.option("--tokens", metavar="ID,ID,...", help="Token ids to continue instead of a text; prints token ids.")
@adapter_option
@backend_option
@overcommit_option
@click.option("--compute", metavar="float32|bfloat16", help="Dtype of activations. Default: the model's own.")
@click.option("--max-length", type=click.IntRange(1), help="Maximum sequence length, which selects longrope's factors.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Maximum number of new tokens. Default: the model's, or 256."
)
@click.option("--temperature", type=float, help="Sampling temperature; 0 is greedy. Default: the model's, or 0.8.")
@click.option("--top-k", type=int, help="Sample from the k most probable tokens.")
@click.option("--top-p", type=float, help="Sample from the fewest tokens whose probabilities sum to p.")
@click.option("--min-p", type=float, help="Drop tokens less probable than this fraction of the most probable.")
@click.option("--repetition-penalty", type=float, help="Penalty on tokens that already occur; 1 is off.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Number of samples per prompt.")
def generate(
    path: Path,
    prompts: tuple[str, ...],
    chat: bool,
    tokens: str | None,
    adapter: Path | None,
    backend: str | None,
    allow_overcommit: bool,
    compute: str | None,
    max_length: int | None,
    max_new_tokens: int | None,
    samples: int,
    **options: Any,
) -> None:
    """Generate text from a model.

    PATH is a run folder, a Hugging Face folder or a hub id. Sampling options of a Hugging Face model default to its
    generation_config.json.
    """
    from moezoo.api import load_model
    from moezoo.core.generation.config import GenerationConfig

    GenerationConfig().options(**options)  # rejects bad options before the model is loaded
    if bool(prompts) == (tokens is not None) or (chat and not prompts):
        raise DataError(
            "generate needs a prompt; expected --prompt TEXT, with or without --chat, or --tokens ID,ID,..."
        )
    ids = None if tokens is None else _token_ids(tokens)
    model = load_model(path, backend, compute, max_length, adapter=adapter, allow_overcommit=allow_overcommit)
    generation = model.generation
    warn(*model.problems)
    warn(*(f"{generation.where}: {name} is an unknown field and has no effect" for name in generation.unknown))
    rows, texts = _encoded(model, prompts, chat, ids)
    longest = max(len(row) for row in rows)
    new_tokens = generation.new_tokens(max_new_tokens, longest, _NEW_TOKENS)
    warn(*model.check_generation(samples * len(rows), longest, new_tokens))
    printer = _SamplePrinter(
        model.tokenizer if ids is None else None,
        [row for row in rows for _ in range(samples)],
        [text for text in texts for _ in range(samples)],
        model.end_tokens(chat),
    )
    if options["temperature"] is None and generation.temperature is None:
        options["temperature"] = _TEMPERATURE
    generation.options(**options)  # rejects bad settings of the model before anything is printed
    printer.start()
    model.generate(printer.rows, max_new_tokens=new_tokens, on_tokens=printer.add, chat=chat, **options)
    printer.finish()


def _encoded(
    model: "LoadedModel", prompts: Sequence[str], chat: bool, ids: list[int] | None
) -> tuple[list["IdsLike"], list[str]]:
    """Return the prompts as token ids, and the text with which each output starts."""
    import numpy as np

    if ids is not None:
        return [np.array(ids)], [",".join(map(str, ids))]
    rows = [model.encode_prompt(prompt, chat=chat) for prompt in prompts]
    if any(row.size == 0 for row in rows):
        raise DataError("--prompt is empty; expected at least one token to continue. Give some text.")
    return list(rows), ["" if chat else prompt for prompt in prompts]


class _SamplePrinter:
    """Prints a single sample as it is generated, and several samples when all are finished."""

    def __init__(
        self, tokenizer: "Tokenizer | None", rows: list["IdsLike"], texts: list[str], end_tokens: tuple[int, ...]
    ):
        from moezoo.core.generation.loop import Continuation

        self.rows, self._texts = rows, texts
        self._continuations = [Continuation(tokenizer, row, end_tokens) for row in rows]
        self._streams = len(rows) == 1

    def start(self) -> None:
        if self._streams:
            click.echo(self._texts[0], nl=False)

    def add(self, column: Any) -> None:
        for index, token in enumerate(column):
            piece = self._continuations[index].add(int(token))
            self._texts[index] += piece
            if self._streams:
                click.echo(piece, nl=False)

    def finish(self) -> None:
        endings = [continuation.finish() for continuation in self._continuations]
        if self._streams:
            click.echo(endings[0])
            return
        for index, (text, ending) in enumerate(zip(self._texts, endings, strict=True)):
            click.echo(f"--- sample {index + 1}\n{text}{ending}")


def _token_ids(text: str) -> list[int]:
    pieces = text.replace(",", " ").split()
    if not pieces or not all(piece.isascii() and piece.isdigit() for piece in pieces):
        raise DataError(f"--tokens is {text!r}; expected token ids, e.g. --tokens 1,2,3.")
    return [int(piece) for piece in pieces]
