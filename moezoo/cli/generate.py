"""`moezoo generate`."""

from pathlib import Path
from typing import Any

import click

from moezoo.cli.options import backend_option
from moezoo.core.errors import DataError


@click.command()
@click.argument("path", metavar="PATH", type=Path)
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="The text to continue. Repeat it for several.")
@click.option("--chat", is_flag=True, help="The prompt is a message; answer it, by the tokenizer's chat template.")
@click.option("--tokens", metavar="ID,ID,...", help="Token ids to continue, instead of a text; prints ids.")
@backend_option
@click.option("--compute", metavar="float32|bfloat16", help="Dtype of activations. Default: the model's own.")
@click.option("--max-length", type=click.IntRange(1), help="Tokens in all, where a rotation depends on it (longrope).")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Default: what PATH says, else 256.")
@click.option("--temperature", type=float, help="0 is greedy. Default: what PATH says, else 0.8.")
@click.option("--top-k", type=int, help="Keep the k most probable tokens.")
@click.option("--top-p", type=float, help="Keep the fewest tokens that hold this probability.")
@click.option("--min-p", type=float, help="Keep tokens at least this fraction as probable as the best.")
@click.option("--repetition-penalty", type=float, help="Above 1: tokens that are already there are less likely.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Continue so many times at once.")
def generate(
    path: Path,
    prompts: tuple[str, ...],
    chat: bool,
    tokens: str | None,
    backend: str | None,
    compute: str | None,
    max_length: int | None,
    max_new_tokens: int | None,
    samples: int,
    **options: Any,
) -> None:
    """Continue prompts with a model: a run folder, a Hugging Face folder or hub id.

    A Hugging Face model samples as its generation_config.json says, unless an option says otherwise.
    """
    import numpy as np

    from moezoo.api import load_model
    from moezoo.core.generation.config import GenerationConfig
    from moezoo.core.generation.loop import Continuation

    GenerationConfig().options(**options)  # refuse bad options before anything is loaded
    if bool(prompts) == (tokens is not None) or (chat and not prompts):
        raise DataError(
            "generate needs a prompt; expected --prompt TEXT, with or without --chat, or --tokens ID,ID,..."
        )
    given = None if tokens is None else _token_ids(tokens)
    model = load_model(path, backend, compute, max_length)
    for problem in model.problems:
        click.echo(problem, err=True)
    for name in model.generation.unknown:
        click.echo(f"{model.generation.where}: {name} is not known, and has no effect", err=True)
    if given is None:
        rows = [model.encode_prompt(prompt, chat=chat) for prompt in prompts for _ in range(samples)]
        texts = ["" if chat else prompt for prompt in prompts for _ in range(samples)]
    else:
        rows, texts = [np.array(given)] * samples, [",".join(map(str, given))] * samples
    if any(row.size == 0 for row in rows):
        raise DataError("--prompt is empty; expected at least one token to continue. Give some text.")
    said = [Continuation(model.tokenizer if given is None else None, row, model.generation.end_tokens) for row in rows]

    def show(column: Any) -> None:
        for index, token in enumerate(column):
            piece = said[index].add(int(token))
            texts[index] += piece
            if len(rows) == 1:
                click.echo(piece, nl=False)

    if len(rows) == 1:
        click.echo(texts[0], nl=False)
    if options["temperature"] is None and model.generation.temperature is None:
        options["temperature"] = 0.8
    new_tokens = model.generation.new_tokens(max_new_tokens, max(len(row) for row in rows), 256)
    model.generate(rows, max_new_tokens=new_tokens, on_tokens=show, **options)
    endings = [one.finish() for one in said]
    if len(rows) == 1:
        click.echo(endings[0])
        return
    for index, (text, ending) in enumerate(zip(texts, endings, strict=True)):
        click.echo(f"--- sample {index + 1}\n{text}{ending}")


def _token_ids(text: str) -> list[int]:
    pieces = text.replace(",", " ").split()
    if not pieces or not all(piece.isascii() and piece.isdigit() for piece in pieces):
        raise DataError(f"--tokens is {text!r}; expected token ids, e.g. --tokens 1,2,3.")
    return [int(piece) for piece in pieces]
