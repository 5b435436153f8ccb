"""The options of `moezoo trace` that read and write the routing formats of other programs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moezoo.cli.output import warn
from moezoo.core.errors import DataError

if TYPE_CHECKING:
    from moezoo.core.data.tokenizers import Tokenizer
    from moezoo.core.traces.formats.foreign import Known

FORMATS = ("vllm", "sglang", "maxtext", "olmoe", "csv")
_format = click.Choice(FORMATS)


def format_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of other programs' formats to a command, which gets them as one `formats`: a FormatOptions."""
    options = (
        click.option("--from", "source", type=_format, help="Read PATH as another program's routing."),
        click.option("--to", "target", type=_format, help="Write the trace at PATH for another program."),
        click.option("--model", metavar="MODEL", help="With --from or --to: the model that routed."),
        click.option("--layers", metavar="0-3,5", help="With --from: the MoE layers, instead of --model."),
        click.option("--experts", type=click.IntRange(1), metavar="E", help="With --from: experts per layer."),
        click.option("--top-k", type=click.IntRange(1), metavar="K", help="With --from: experts per token."),
    )

    @functools.wraps(command)
    def with_formats(
        source: str | None,
        target: str | None,
        model: str | None,
        layers: str | None,
        experts: int | None,
        top_k: int | None,
        **others: Any,
    ) -> None:
        command(formats=FormatOptions(source, target, model, layers, experts, top_k), **others)

    for option in reversed(options):
        with_formats = option(with_formats)
    return with_formats


@dataclass(frozen=True)
class FormatOptions:
    """The options of other programs' formats, as given."""

    source: str | None
    target: str | None
    model: str | None
    layers: str | None
    experts: int | None
    top_k: int | None

    def __post_init__(self) -> None:
        facts = {"--model": self.model, "--layers": self.layers, "--experts": self.experts, "--top-k": self.top_k}
        given = [name for name, value in facts.items() if value is not None]
        if self.source is not None and self.target is not None:
            raise DataError("--from and --to are two conversions; got both. Use one after the other.")
        if given and self.source is None and not (self.target is not None and given == ["--model"]):
            raise DataError(f"{', '.join(given)} describe the model of --from; got none. Add --from FORMAT.")

    def __bool__(self) -> bool:
        """Return whether a conversion was asked for."""
        return self.source is not None or self.target is not None

    def convert(self, path: Path, out: Path) -> None:
        """Convert a file; what is missing or lost is printed to standard error."""
        from moezoo.core.traces.formats.convert import export_trace, import_trace
        from moezoo.core.traces.trace_file import open_trace

        known, tokenizer = self._known()
        if self.source is not None:
            notes = import_trace(self.source, path, out, known, tokenizer)
        else:
            assert self.target is not None
            notes = export_trace(open_trace(path), self.target, out, known.depth)
        warn(*(f"note: {note}" for note in notes))
        click.echo(f"{out}: the routing of {path}" if self.source is not None else f"{out}: {path} for {self.target}")

    def _known(self) -> "tuple[Known, Tokenizer | None]":
        """Return the facts about the model that routed, and its tokenizer."""
        from moezoo.core.runs.open import describe_model
        from moezoo.core.traces.formats.foreign import Known, known_of

        known, tokenizer = Known(), None
        if self.model is not None:
            spec, _ = describe_model(self.model)
            known = known_of(spec, self.model)
            tokenizer = _tokenizer(self.model, spec.vocab)
        if self.layers is not None:
            known = replace(known, layers=_layer_indices(self.layers))
        if self.experts is not None:
            known = replace(known, num_experts=(self.experts,))
        return replace(known, top_k=self.top_k or known.top_k), tokenizer


def _tokenizer(model: str, vocab: int) -> "Tokenizer":
    """Return the tokenizer of a run, Hugging Face folder or hub id."""
    from moezoo.core.data.load_tokenizer import tokenizer_of_model_folder
    from moezoo.core.runs.open import checkpoint_folder
    from moezoo.core.runs.run_folder import is_run, load_run_tokenizer

    if is_run(model):
        return load_run_tokenizer(model)
    return tokenizer_of_model_folder(checkpoint_folder(model, weights=False), vocab)


def _layer_indices(text: str) -> tuple[int, ...]:
    """Return the indices that a list of numbers and ranges names, ascending."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or not int(first) <= int(last or first) < 10_000:
            raise DataError(f"--layers is {text!r:.80}; expected numbers and ranges of layers, for example 0-3,5.")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
