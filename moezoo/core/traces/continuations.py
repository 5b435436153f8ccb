"""Greedy continuations of the documents of a trace."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from moezoo.core.backend import Model
from moezoo.core.errors import DataError
from moezoo.core.progress import Progress
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.tokens import Integers
from moezoo.core.traces.places import SourceRows


@dataclass(frozen=True)
class RecordOptions:
    """Options of a recording.

    Fields:
        sequence_length, batch_size, first_token: as in `evaluate`; a source that is shorter has one window.
        generate: number of tokens to generate after each document, greedily, at most; 0: none.
        end_tokens: generation of a document ends with one of these.
    """

    sequence_length: int
    batch_size: int
    first_token: int | None = None
    generate: int = 0
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.generate < 0:
            raise DataError(f"generate is {self.generate}; expected 0 or more tokens.")


def continue_documents(model: Model, sources: Sequence[SourceRows], options: RecordOptions, report: Progress) -> None:
    """Generate after each document of the sources, and keep what was generated there.

    Raises DataError: prebatched rows, which are not documents.
    """
    total, done = sum(len(source.ends) for source in sources), 0
    report("generating", done, total)
    for source in sources:
        if source.source is None:
            raise DataError(
                "rows of prebatched data are not continued: they are no documents; expected text. Leave out --generate."
            )
        for prompts in _in_batches(source.prompts(options.sequence_length, options.first_token), options.batch_size):
            source.generated += _generated(model, prompts, options)
            done += len(prompts)
            report("generating", done, total)


def continued_documents(
    source: SourceRows, options: RecordOptions
) -> Iterator[tuple[int, list[tuple[Integers, Integers]]]]:
    """Yield the continued documents in batches: the number of the first one, and the (prompt, generated) of each."""
    first, prompts = 0, source.prompts(options.sequence_length, options.first_token)
    for batch in _in_batches(prompts, options.batch_size):
        yield first, list(zip(batch, source.generated[first : first + len(batch)], strict=True))
        first += len(batch)


def _in_batches(prompts: Iterator[Integers], size: int) -> Iterator[list[Integers]]:
    while batch := list(islice(prompts, size)):
        yield batch


def _generated(model: Model, prompts: list[Integers], options: RecordOptions) -> list[Integers]:
    """Return what the model generates after each prompt, up to its end token."""
    generation = model.start_generation(prompts, options.generate, SamplingOptions(temperature=0.0))
    columns: list[Integers] = []
    ended = np.zeros(len(prompts), bool)
    while len(columns) < options.generate and not ended.all():
        columns.append(generation.next().fetch())
        ended |= np.isin(columns[-1], options.end_tokens)
    found = []
    for row in np.stack(columns, axis=1):
        ends = np.flatnonzero(np.isin(row, options.end_tokens))
        found.append(row[: ends[0] + 1] if len(ends) else row)
    return found
