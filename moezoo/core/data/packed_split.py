"""Training and validation split of whole documents, packed into sequences as a pure function of (step, seed).

Writing: writings/packed_documents.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moezoo.core.data.batch import NOWHERE, Batch, Positions
from moezoo.core.data.packing import Epochs, Packing, Pieces, cut, packed
from moezoo.core.data.splits import samples
from moezoo.core.data.token_shards import Tokens
from moezoo.core.errors import DataError
from moezoo.core.tokens import IGNORED, PADDING, targets_of, tokens_of

Integers = npt.NDArray[np.int64]

Place = tuple[int, Packing, int]
"""A sequence: its source, the packing of an epoch, and its number there."""


@dataclass(frozen=True)
class DocumentSource:
    """Documents of a source that belong to a split: document i is the tokens [start[i], start[i] + length[i])."""

    name: str
    tokens: Tokens
    start: Integers
    length: Integers
    weight: float

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self.length.sum())

    def pieces(self, sequence_length: int) -> Pieces:
        """Return the documents, cut to at most `sequence_length` targets."""
        return cut(self.start, self.length, sequence_length)

    def padding(self, sequence_length: int) -> float:
        """Return the share of padding in the sequences of an epoch; 0 without documents."""
        pieces = self.pieces(sequence_length)
        if not len(pieces.size):
            return 0.0
        return 1 - float(pieces.size.sum()) / (len(packed(pieces, sequence_length, 0, 0, 0)) * sequence_length)

    def part(self, count: int) -> "DocumentSource":
        """Return the first `count` documents; the weight is the number of their tokens."""
        length = self.length[:count]
        return replace(self, start=self.start[:count], length=length, weight=float(length.sum()))


class PackedSplit:
    """Training or validation split of whole documents; same interface as `splits.Split`."""

    def __init__(self, name: str, sources: tuple[DocumentSource, ...]):
        self.name, self.sources = name, sources
        self._epochs: dict[tuple[int, int], list[Epochs]] = {}

    @property
    def num_sources(self) -> int:
        """Number of sources."""
        return len(self.sources)

    @property
    def source_names(self) -> str:
        """Names of the sources, for errors."""
        return ", ".join(source.name for source in self.sources)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return sum(source.num_tokens for source in self.sources)

    def batch(
        self,
        step: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Batch:
        """Return the batch of a step; with `rows` only these rows of it.

        A pure function of the arguments, in the ranges of `Split.batch`, and of the sources: `splits.samples` maps a
        row to a source and an index j in it, and `packing.Epochs` that to a sequence of an epoch.
        """
        return _filled(self.sources, *self._place(step, batch_size, sequence_length, seed, rows), sequence_length)

    def positions(
        self,
        step: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Positions:
        """Return the positions of the inputs of a batch, in the documents one after the other."""
        return _positions(self.sources, *self._place(step, batch_size, sequence_length, seed, rows), sequence_length)

    def _place(
        self, step: int, batch_size: int, sequence_length: int, seed: int, rows: npt.NDArray[np.int64] | None
    ) -> tuple[list[Pieces], list[Place]]:
        """Return the pieces of each source, and the place of each row of a batch."""
        weights = [source.weight for source in self.sources]
        source_of, index = samples(weights, step, batch_size, sequence_length, seed, rows)
        if (sequence_length, seed) not in self._epochs:
            pieces = [source.pieces(sequence_length) for source in self.sources]
            self._epochs[sequence_length, seed] = [
                Epochs(own, sequence_length, seed, k) for k, own in enumerate(pieces)
            ]
        epochs = self._epochs[sequence_length, seed]
        places = []
        for k, number in zip(source_of.tolist(), index.tolist(), strict=True):
            epoch, within = epochs[k].find(number)
            places.append((k, epochs[k].epoch(epoch), within))
        return [each.pieces for each in epochs], places

    def windows(self, sequence_length: int, count: int | None = None) -> "PackedSequences":
        """Return all documents, packed in their own order; with `count`, that many evenly spaced sequences."""
        return PackedSequences(self.sources, sequence_length, count)

    def num_windows(self, sequence_length: int) -> int:
        """Return the number of sequences of all sources, packed in their own order."""
        return len(self.windows(sequence_length))


class PackedSequences:
    """Packed sequences, read batch by batch."""

    def __init__(self, sources: tuple[DocumentSource, ...], sequence_length: int, count: int | None):
        self._sources, self._length = sources, sequence_length
        self._pieces = [source.pieces(sequence_length) for source in sources]
        self._packings = [packed(pieces, sequence_length, 0, 0, None) for pieces in self._pieces]
        self._ends = np.cumsum([len(packing) for packing in self._packings])
        total = int(self._ends[-1])
        self._number = np.arange(total if count is None else min(count, total))
        self._number = self._number * total // len(self._number)

    def __len__(self) -> int:
        return len(self._number)

    def batch(self, first: int, last: int) -> Batch:
        """Return the sequences first, ..., last - 1."""
        return _filled(self._sources, self._pieces, self._place(first, last), self._length)

    def positions(self, first: int, last: int) -> Positions:
        """Return the positions of their inputs, in the documents one after the other."""
        return _positions(self._sources, self._pieces, self._place(first, last), self._length)

    def _place(self, first: int, last: int) -> list[Place]:
        places = []
        for number in self._number[first:last].tolist():
            k = int(np.searchsorted(self._ends, number, side="right"))
            places.append((k, self._packings[k], number - int(self._ends[k]) + len(self._packings[k])))
        return places


def _filled(
    sources: tuple[DocumentSource, ...],
    pieces: list[Pieces],
    places: list[Place],
    sequence_length: int,
) -> Batch:
    """Read the pieces of sequences."""
    shape = (len(places), sequence_length)
    windows = np.zeros((shape[0], shape[1] + 1), np.int32)
    targets, documents = np.full(shape, IGNORED, np.int32), np.full(shape, PADDING, np.int32)
    for k, source in enumerate(sources):
        own = [(row, *place[1:]) for row, place in enumerate(places) if place[0] == k]
        for row, number, column, ids in _read(source, pieces[k], own):
            stop = column + len(ids) - 1
            windows[row, column:stop], targets[row, column:stop] = tokens_of(ids[:-1]), targets_of(ids[1:])
            documents[row, column:stop] = number
    return Batch(windows, targets, documents)


def _positions(
    sources: tuple[DocumentSource, ...], pieces: list[Pieces], places: list[Place], sequence_length: int
) -> Positions:
    """Return the positions of the inputs of sequences."""
    index = np.full((len(places), sequence_length), NOWHERE, np.int64)
    before = [np.cumsum(source.length) - source.length for source in sources]
    for row, (k, packing, within) in enumerate(places):
        column = 0
        for piece in packing.piece[packing.first[within] : packing.first[within + 1]].tolist():
            start, size = int(pieces[k].start[piece]), int(pieces[k].size[piece])
            document = int(np.searchsorted(sources[k].start, start, side="right")) - 1
            first = int(before[k][document]) + start - int(sources[k].start[document])
            index[row, column : column + size] = np.arange(first, first + size)
            column += size
    return Positions(np.array([place[0] for place in places], np.int64), index)


def _read(
    source: DocumentSource, pieces: Pieces, own: list[tuple[int, Packing, int]]
) -> Iterator[tuple[int, int, int, npt.NDArray[np.int32]]]:
    """Yield row, number in its sequence, first column and ids of each piece, one more than its targets."""
    found = []
    for row, packing, within in own:
        column = 0
        for number, piece in enumerate(packing.piece[packing.first[within] : packing.first[within + 1]].tolist()):
            found.append((piece, row, number, column))
            column += int(pieces.size[piece])
    chosen = np.array([each[0] for each in found], np.int64)
    ids = source.tokens.read_ragged(pieces.start[chosen], pieces.size[chosen] + 1)
    for (_, row, number, column), own_ids in zip(found, ids, strict=True):
        yield row, number, column, own_ids


def all_documents(name: str, tokens: Tokens, ends: Integers) -> DocumentSource:
    """Return the documents of a source that have a target; its weight is the number of their tokens.

    `ends`: the place of the id after each document. Raises DataError: there are none.
    """
    start = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    length = ends - start
    has_target = length > 1
    if not has_target.any():
        raise DataError(f"{name} has no document of two tokens or more; expected at least one. Use a file with more.")
    return DocumentSource(name, tokens, start[has_target], length[has_target], float(length[has_target].sum()))


def divided(source: DocumentSource, validation_fraction: float) -> tuple[DocumentSource, DocumentSource]:
    """Hold out the documents that begin in the last `validation_fraction` of a source's tokens, at least the last one.

    Raises DataError: there are fewer than two documents.
    """
    if len(source.start) < 2:
        raise DataError(
            f"{source.name} has one document; expected at least 2 for data.documents: separate, one to train on and "
            "one to hold out. Use documents: windows, data.validation, or a file or line for each document."
        )
    before = np.cumsum(source.length) - source.length
    held = max(1, int(np.sum(before >= (1 - validation_fraction) * source.num_tokens)))
    count = max(1, len(source.start) - held)
    return source.part(count), replace(source, start=source.start[count:], length=source.length[count:])
