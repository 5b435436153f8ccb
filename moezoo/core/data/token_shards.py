"""Token ids in `.npy` and `.bin` files, read window by window.

Files are read, not memory-mapped: if a file is truncated while it is mapped, SIGBUS kills the process. A file is open
only during a read, so any number of shards fits under the limit of open files.
"""

import contextlib
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moezoo.core.data.npy_header import read_npy_header
from moezoo.core.data.source_files import BIN_MAGIC, suffix_of
from moezoo.core.data.tokenizers import Ids
from moezoo.core.errors import DataError
from moezoo.core.files import open_regular, reason_of
from moezoo.core.tokens import tokens_of

IntegerArray = npt.NDArray[np.integer[Any]]
Read = Callable[[int, int], IntegerArray]

_BIN_VERSION, _BIN_HEADER = 1, 256  # modded-nanogpt: 256 int32, then uint16 tokens
_BLOCK_READ = 1 << 22  # ids, of a file that is searched
_BLOCKS, _BLOCK_IDS = 16, 4096  # of a file whose SHA-256 is not known, for its digest
_RESTORE = "Restore the file (one in the token cache is made again), and start again."


@dataclass(frozen=True)
class IdFile:
    """An array of integers in a file.

    Fields:
        path: the file.
        name: of the file or its source, for errors.
        dtype: of the integers.
        shape: of the array, which is in C order.
        offset: byte of the file at which the array begins.
        stamp: size and modification time (ns) of the file when it was opened first.
        sha256: of the file, if it is known.
    """

    path: Path
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    stamp: tuple[int, int]
    sha256: str | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def digest(self) -> str:
        """Return a digest of the content: the file's SHA-256 if it is known, else one of 16 evenly spaced blocks."""
        if self.sha256 is not None:
            return self.sha256
        count = math.prod(self.shape)
        block = min(_BLOCK_IDS, count)
        found = hashlib.sha256(f"{self.dtype.str} {self.shape}".encode())
        with self.opened() as read:
            for number in range(_BLOCKS):
                found.update(read((count - block) * number // (_BLOCKS - 1), block).tobytes())
        return found.hexdigest()

    @contextlib.contextmanager
    def opened(self) -> Iterator[Read]:
        """Open the file and yield a function that reads `count` integers from the flat index `first`.

        Raises DataError: the file is gone, unreadable, or was changed since it was opened first.
        """
        try:
            with open_regular(self.path) as file:
                self._check_unchanged(file)
                yield lambda first, count: self._read(file, first, count)
                self._check_unchanged(file)
        except OSError as error:
            raise DataError(
                f"token ids cannot be read; got {reason_of(error)}; expected the file that was there at the "
                f"start; {self._place}. {_RESTORE}"
            ) from None

    def _read(self, file: BinaryIO, first: int, count: int) -> IntegerArray:
        size, position = count * self.dtype.itemsize, self.offset + first * self.dtype.itemsize
        content = os.pread(file.fileno(), size, position)
        while len(content) < size:  # Linux reads at most 2 GiB at once
            more = os.pread(file.fileno(), size - len(content), position + len(content))
            if not more:
                raise self._changed(f"its end at byte {position + len(content)}")
            content += more
        return np.frombuffer(content, self.dtype)

    def _check_unchanged(self, file: BinaryIO) -> None:
        stamp = _stamp(file)
        if stamp != self.stamp:
            same_size = stamp[0] == self.stamp[0]
            raise self._changed("another modification time" if same_size else f"{stamp[0]} bytes")

    def _changed(self, got: str) -> DataError:
        return DataError(
            f"token ids were changed while they were in use; got {got}; expected the file of {self.stamp[0]} bytes "
            f"that was there at the start; {self._place}. {_RESTORE}"
        )

    @property
    def _place(self) -> str:
        return self.name if self.name == str(self.path) else f"{self.path} of {self.name}"


class Tokens:
    """Read-only view of one or more shards as one array of token ids."""

    def __init__(self, shards: Sequence[IdFile], vocab_size: int, name: str, *, marked: bool = False) -> None:
        """`name` is used in errors. Ids are checked against `vocab_size` when they are read.

        `marked`: ids that are not trained on are marked (`core.tokens.masked`).
        """
        self._shards = tuple(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self._begins = [0, *self._ends.tolist()]
        self._vocab_size, self._name, self._marked = vocab_size, name, marked
        narrow = all(shard.dtype.itemsize < 4 or shard.dtype == np.int32 for shard in self._shards)
        self._dtype = np.dtype(np.int32 if narrow else np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def digest(self) -> str:
        """Return a digest of the content; see `IdFile.digest`."""
        return hashlib.sha256(" ".join(shard.digest() for shard in self._shards).encode()).hexdigest()

    def read(self, starts: npt.NDArray[np.integer[Any]], length: int) -> Ids:
        """Read windows of `length` ids that begin at `starts` and are within the array: int32 [n, length].

        Ids that are not trained on are marked, where there are any.

        Raises DataError: an id outside the vocabulary, or a file that was changed or removed since it was opened.
        """
        return self._read(starts, np.full(len(starts), length)).reshape(len(starts), length)

    def read_ragged(self, starts: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> list[Ids]:
        """Read parts of unequal length, as `read` does: int32 [lengths[i]] each."""
        return np.split(self._read(starts, lengths), np.cumsum(lengths)[:-1])

    def find(self, token: int) -> npt.NDArray[np.int64]:
        """Return the places of an id in the array, ascending. All shards are read."""
        found = []
        for begin, shard in zip(self._begins, self._shards, strict=False):
            with shard.opened() as read:
                for first in range(0, len(shard), _BLOCK_READ):
                    ids = read(first, min(_BLOCK_READ, len(shard) - first))
                    found.append(begin + first + np.flatnonzero(ids == token))
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _read(self, starts: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> Ids:
        """Return the parts one after the other."""
        ids = np.empty(int(lengths.sum()), self._dtype)
        pieces = sorted(self._pieces(starts, lengths))
        for shard, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
            with self._shards[shard].opened() as read:
                for _, at, place, count in group:
                    ids[place : place + count] = read(at, count)
        check_range(tokens_of(ids) if self._marked else ids, self._vocab_size, self._name)
        return ids.astype(np.int32, copy=False)

    def _pieces(
        self, starts: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yield the pieces of parts in each shard: (shard, index in it, place in the result, number of ids)."""
        shard_of, ends = np.searchsorted(self._ends, starts, side="right"), np.cumsum(lengths)
        for shard, start, length, end in zip(*(x.tolist() for x in (shard_of, starts, lengths, ends)), strict=True):
            at, left = start - self._begins[shard], length
            while left:  # one iteration, unless the part crosses a shard boundary
                count = min(left, len(self._shards[shard]) - at)
                yield shard, at, end - left, count
                shard, at, left = shard + 1, 0, left - count


def check_range(ids: IntegerArray, vocab_size: int, name: str) -> None:
    """Check that all ids are in [0, vocab_size); `name` is used in errors. Raises DataError."""
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        low, high = int(ids.min()), int(ids.max())
        raise DataError(
            f"token id outside the vocabulary; got {low if low < 0 else high}; expected 0 to {vocab_size - 1}; {name}. "
            "Set data.tokenizer to the tokenizer that made the ids."
        )


def open_shard(path: Path, name: str) -> IdFile:
    """Open one shard; `name` is used in errors. Raises DataError: not a shard, damaged or empty."""
    shard = _open_bin(path, name) if suffix_of(path) == ".bin" else _open_npy(path, name)
    if not len(shard):
        raise DataError(f"token shard is empty; got 0 tokens; expected at least 1; {name}. Remove it.")
    return shard


def open_npy(path: Path, name: str) -> IdFile:
    """Open an array in a `.npy` file; `name` is used in errors.

    Raises OSError, and ValueError if it is not such a file, is truncated, has no integers, or is not in C order.
    """
    with open_regular(path) as file:
        stamp = _stamp(file)
        header = read_npy_header(file, stamp[0])
    if header.fortran_order and len(header.shape) > 1:
        raise ValueError("it is in Fortran order; write numpy.ascontiguousarray(ids)")
    return IdFile(path, name, header.dtype, header.shape, header.start_byte, stamp)


def _open_npy(path: Path, name: str) -> IdFile:
    try:
        shard = open_npy(path, name)
    except OSError as error:
        raise _unreadable(name, error) from None
    except ValueError as error:
        raise DataError(
            f"token shard is damaged or not a .npy file; got {name} ({reason_of(error)}); expected integers written by "
            "numpy.save. Write it again."
        ) from None
    if len(shard.shape) != 1:
        raise DataError(
            f"token shard is not a one-dimensional array of ids; got {shard.dtype} {list(shard.shape)}; expected "
            f"integers; {name}. Write numpy.save(path, ids.astype(numpy.uint16))."
        )
    return shard


def _open_bin(path: Path, name: str) -> IdFile:
    try:
        with open_regular(path) as file:
            stamp = _stamp(file)
            content = file.read(4 * _BIN_HEADER)
    except OSError as error:
        raise _unreadable(name, error) from None
    size, header = stamp[0], np.frombuffer(content[: len(content) // 4 * 4], "<i4")
    expected = f"expected the magic number {BIN_MAGIC} and version {_BIN_VERSION} of modded-nanogpt's format"
    if len(header) < _BIN_HEADER or header[0] != BIN_MAGIC or header[1] != _BIN_VERSION:
        got = f"{header[0]} and {header[1]}" if len(header) >= 2 else "nothing"
        raise DataError(
            f"token shard has an unknown header; got {got} in {size} bytes; {expected}; {name}. "
            "Write it again, or as .npy."
        )
    count, present = int(header[2]), (size - 4 * _BIN_HEADER) / 2
    if count != present:
        raise DataError(
            f"token shard is damaged: its header has a count of {count} tokens, but the file has {present:g}; {name}. "
            "Download or write it again."
        )
    return IdFile(path, name, np.dtype("<u2"), (count,), 4 * _BIN_HEADER, stamp)


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(
        f"token shard cannot be read; got {name} ({reason_of(error)}); expected a readable file. Check its permissions."
    )


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
