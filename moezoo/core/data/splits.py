"""Training and validation split of tokens, and their batches as a pure function of (step, seed).

There is no iterator and no state: `Split.batch(step, ...)` computes the windows of a step (sample_order.py) and reads
them from shards (token_shards.py). To resume, a run needs only its step. Writing: writings/data.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.data import sample_order
from moezoo.core.data.batch import NOWHERE, Positions
from moezoo.core.data.token_shards import Tokens
from moezoo.core.data.tokenizers import Ids
from moezoo.core.errors import DataError

WHOLE = "evaluated"
"""Name of a split that is a whole file."""


@dataclass(frozen=True)
class SplitSource:
    """Part of a source that belongs to a split: tokens [first, first + num_tokens). `weight` is in proportion."""

    name: str
    tokens: Tokens
    first: int
    num_tokens: int
    weight: float


def samples(
    weights: Sequence[float],
    step: int,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows: npt.NDArray[np.int64] | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Return the source of each row of a batch, and the row's number in it; of `rows` alone, if given.

    Raises DataError: arguments out of the range that `Split.batch` states.
    """
    _check_integer("step", step, 0, (1 << 62) // max(batch_size, 1))
    _check_integer("batch_size", batch_size, 1, 1 << 31)
    _check_integer("sequence_length", sequence_length, 1, 1 << 31)
    _check_integer("seed", seed, 0, 1 << 64)
    sample = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
    return sample_order.blend(sample if rows is None else sample[rows], weights, seed)


@dataclass(frozen=True)
class Split:
    """Training or validation split of all sources."""

    name: str
    sources: tuple[SplitSource, ...]

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
        """Number of tokens of all sources."""
        return sum(source.num_tokens for source in self.sources)

    def batch(
        self,
        step: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Ids:
        """Return the batch of a step: int32 [B, T + 1], where [:, :-1] is the input and [:, 1:] the target.

        Tokens that are not trained on are marked: see `core.tokens.masked`.

        With `rows`, only these rows of the batch are read and returned, in this order.

        The batch is a pure function of the arguments and the sources. Row b is sample g = step * B + b;
        `sample_order.blend` maps it to a source and an index j in it, `sample_order.starts` to a window.

        `step` is in [0, 2**62 / B), `seed` in [0, 2**64). Raises DataError: arguments out of range, a source
        shorter than T + 1 tokens, a token id outside the vocabulary.
        """
        source_of, start = self._place(step, batch_size, sequence_length, seed, rows)
        batch = np.empty((len(start), sequence_length + 1), np.int32)
        for k, source in enumerate(self.sources):
            own = np.flatnonzero(source_of == k)
            if len(own):
                batch[own] = source.tokens.read(start[own] + source.first, sequence_length + 1)
        return batch

    def positions(
        self,
        step: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Positions:
        """Return the positions of the inputs of a batch; arguments are those of `batch`."""
        source_of, start = self._place(step, batch_size, sequence_length, seed, rows)
        return Positions(source_of, start[:, None] + np.arange(sequence_length))

    def _place(
        self, step: int, batch_size: int, sequence_length: int, seed: int, rows: npt.NDArray[np.int64] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the source of each row of a batch, and the first token in it, both int64 [B]."""
        weights = [source.weight for source in self.sources]
        source_of, index = samples(weights, step, batch_size, sequence_length, seed, rows)
        start = np.empty(len(index), np.int64)
        for k, source in enumerate(self.sources):
            own = np.flatnonzero(source_of == k)
            if len(own):
                check_length(self.name, source, sequence_length)
                start[own] = sample_order.starts(index[own], source.num_tokens, sequence_length, seed, k)
        return source_of, start

    def windows(self, sequence_length: int, count: int | None = None) -> "Windows":
        """Return consecutive windows: int32 [n, T + 1], read lazily, with marked tokens as in `batch`.

        Window i of a source begins at its token i * T. The last one ends at the last token, so its first targets are
        also in the window before (`Windows.are_repeated`). The windows of all sources are concatenated. With `count`,
        that many evenly spaced windows are returned; None or a larger number than there are means all.
        """
        _check_integer("sequence_length", sequence_length, 1, 1 << 31)
        if count is not None:
            _check_integer("count", count, 1, 1 << 62)
        for source in self.sources:
            check_length(self.name, source, sequence_length)
        return Windows(self.sources, sequence_length, count)

    def num_windows(self, sequence_length: int) -> int:
        """Return the number of windows of all sources."""
        return len(self.windows(sequence_length))


class Windows(Sequence[Ids]):
    """Lazy int32 array [n, T + 1]: an index returns a row, a slice an array; `numpy.asarray` reads all of it."""

    def __init__(self, sources: Sequence[SplitSource], sequence_length: int, count: int | None) -> None:
        self._sources = tuple(sources)
        self._length = sequence_length
        self._ends = np.cumsum([-(-(source.num_tokens - 1) // sequence_length) for source in sources])
        self._total = int(self._ends[-1])
        self._count = self._total if count is None else min(count, self._total)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (n, T + 1)."""
        return self._count, self._length + 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._read(np.arange(*index.indices(self._count)))
        number = range(self._count)[index]  # IndexError as for a list
        return self._read(np.array([number]))[0]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("windows are read from disk, so they cannot be converted to an array without a copy")
        return self[:].astype(dtype or np.int32, copy=False)  # type: ignore[no-any-return]

    def are_repeated(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Return which targets of the windows first, ..., last - 1 are targets of the window before: bool [n, T]."""
        _, start, first_new = self._place(np.arange(*slice(first, last).indices(self._count)))
        return np.arange(self._length) < (first_new - start)[:, None]

    def positions(self, first: int, last: int) -> Positions:
        """Return the positions of the inputs of the windows first, ..., last - 1; NOWHERE for repeated ones."""
        source, start, _ = self._place(np.arange(*slice(first, last).indices(self._count)))
        index = start[:, None] + np.arange(self._length)
        return Positions(source, np.where(self.are_repeated(first, last), NOWHERE, index))

    def _place(
        self, number: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return source, first token, and first token that is in no window before of each window, all int64 [n]."""
        window = number * self._total // self._count
        source = np.searchsorted(self._ends, window, side="right")
        first_new = (window - np.concatenate([[0], self._ends])[source]) * self._length
        sizes = np.array([source.num_tokens for source in self._sources])
        return source, np.minimum(first_new, sizes[source] - 1 - self._length), first_new

    def _read(self, number: npt.NDArray[np.int64]) -> Ids:
        source_of, start, _ = self._place(number)
        rows = np.empty((len(number), self._length + 1), np.int32)
        for k, source in enumerate(self._sources):
            own = np.flatnonzero(source_of == k)
            if len(own):
                rows[own] = source.tokens.read(source.first + start[own], self._length + 1)
        return rows


def check_length(split: str, source: SplitSource, sequence_length: int, where: str = "") -> None:
    """Check that a part of a source has at least one window. Raises DataError; `where` ends the error."""
    if source.num_tokens <= sequence_length:
        what, name = f"the {split} split", "training.sequence_length"
        advice = "a shorter sequence_length, more text, or another data.validation_fraction"
        if split == WHOLE:
            what, name, advice = "the data", "sequence length", "a file with more text, or a shorter sequence length"
        raise DataError(
            f"{what} is shorter than one sequence; got {source.num_tokens} tokens; expected at least "
            f"{name} + 1 = {sequence_length + 1}; {source.name}{where}. Use {advice}."
        )


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int | np.integer) or not low <= value < high:
        raise DataError(
            f"{name} is out of range; got {value!r:.80}; expected an integer in [{low}, {high}). Change it."
        )
