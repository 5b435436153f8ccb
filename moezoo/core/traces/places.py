"""Rows of a trace for the tokens of the data, while it is recorded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moezoo.core.data.batch import NOWHERE
from moezoo.core.data.packed_split import DocumentSource, PackedSplit
from moezoo.core.data.prebatched import PrebatchedSplit
from moezoo.core.data.splits import Split, SplitSource
from moezoo.core.tokens import Integers, tokens_of
from moezoo.core.traces.trace_data import TracedData

Places = NDArray[np.int64]


@dataclass
class SourceRows:
    """Rows of the tokens of one source: its documents in their order, each followed by what the model generated.

    Fields:
        domain: index of the domain.
        source: the tokens; None for prebatched rows, which are not continued.
        ends: int64 [documents], the place after each document; one document if its borders are in the tokens.
        first: row of the first token.
        number: number in the trace of the first document; of the last one so far, if borders are in the tokens.
        generated: the tokens that the model generated after each document; empty if it does not.
    """

    domain: int
    source: SplitSource | DocumentSource | None
    ends: Places
    first: int = 0
    number: int = 0
    generated: list[Integers] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Number of rows, those of generated tokens included."""
        return int(self.ends[-1]) + sum(map(len, self.generated))

    def document(self, place: Places) -> Places:
        """Return the index of the document that a place is in."""
        return np.searchsorted(self.ends, place, side="right").astype(np.int64)

    def rows(self, place: Places) -> Places:
        """Return the row of each place."""
        if not self.generated:
            return self.first + place
        lengths = np.array([0, *map(len, self.generated)])
        before: Places = np.cumsum(lengths)[self.document(place)]
        return self.first + place + before

    def tokens(self, place: int, count: int) -> Integers:
        """Read tokens of one document from a place on."""
        assert self.source is not None
        if isinstance(self.source, SplitSource):
            at = self.source.first + place
        else:
            index = int(self.document(np.array([place]))[0])
            at = int(self.source.start[index] + self.source.length[index] - self.ends[index]) + place
        return tokens_of(self.source.tokens.read(np.array([at]), count)[0])

    def prompts(self, most: int, first_token: int | None) -> Iterator[Integers]:
        """Yield the end of each document, up to `most` tokens; of a longer text it begins with the first token."""
        for begin, end in zip([0, *self.ends[:-1].tolist()], self.ends.tolist(), strict=True):
            start = max(begin, end - most)
            ids = self.tokens(start, end - start)
            if first_token is not None and start > begin:
                ids[0] = first_token
            yield ids


def rows_of(data: Sequence[TracedData]) -> list[list[SourceRows]]:
    """Return the rows of each source of each split, from row 0."""
    found: list[list[SourceRows]] = []
    domain = 0
    for traced in data:
        split, own = traced.split, []
        match split:
            case Split():
                own = [SourceRows(0, source, np.array([source.num_tokens])) for source in split.sources]
            case PackedSplit():
                own = [SourceRows(0, source, np.cumsum(source.length)) for source in split.sources]
            case PrebatchedSplit():
                length = split.ids.shape[2]
                own = [SourceRows(0, None, np.arange(length, split.num_tokens + 1, length))]
        for source in own:
            source.domain, domain = domain, domain + 1
        found.append(own)
    return found


def place_rows(sources: Sequence[SourceRows]) -> int:
    """Place the rows of sources one after the other, once it is known what was generated; return their number."""
    total = 0
    for source in sources:
        source.first = total
        total += source.num_rows
    return total


def runs(place: Places) -> Iterator[tuple[int, int]]:
    """Yield the parts [first, last) of places that are consecutive and not NOWHERE."""
    borders = np.flatnonzero((np.diff(place) != 1) | (place[:-1] == NOWHERE)) + 1
    for first, last in zip([0, *borders.tolist()], [*borders.tolist(), len(place)], strict=True):
        if place[first] != NOWHERE:
            yield first, last
