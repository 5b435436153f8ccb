"""Memory-mapped shards of token ids in `.npy` and `.bin` files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.data.tokenizers import Ids
from moezoo.core.errors import DataError

Shard = npt.NDArray[np.integer[Any]]

_BIN_MAGIC, _BIN_VERSION, _BIN_HEADER = 20240520, 1, 256  # modded-nanogpt: 256 int32, then uint16 tokens


class Tokens:
    """Read-only view of one or more memory-mapped shards as one array of token ids."""

    def __init__(self, shards: Sequence[Shard], vocab_size: int, name: str, known_in_range: bool) -> None:
        """`name` is used in errors. Unless `known_in_range`, ids are checked against `vocab_size` when read."""
        self._shards = tuple(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self._begins = [0, *self._ends.tolist()]
        self._vocab_size, self._name, self._known_in_range = vocab_size, name, known_in_range
        narrow = all(shard.dtype.itemsize < 4 or shard.dtype == np.int32 for shard in self._shards)
        self._dtype = np.dtype(np.int32 if narrow or known_in_range else np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def read(self, starts: npt.NDArray[np.integer[Any]], length: int) -> Ids:
        """Read windows of `length` ids that begin at `starts` and are within the array: int32 [n, length].

        Raises DataError for an id outside the vocabulary.
        """
        rows = np.empty((len(starts), length), self._dtype)
        shard_of = np.searchsorted(self._ends, starts, side="right")
        for row, k, start in zip(rows, shard_of.tolist(), starts.tolist(), strict=True):
            at = int(start) - self._begins[k]
            done = 0
            while done < length:  # one iteration, unless the window crosses a shard boundary
                piece = self._shards[k][at : at + length - done]
                row[done : done + len(piece)] = piece
                done, k, at = done + len(piece), k + 1, 0
        if not self._known_in_range:
            check_range(rows, self._vocab_size, self._name)
        return rows.astype(np.int32, copy=False)


def check_range(ids: npt.NDArray[np.integer[Any]], vocab_size: int, name: str) -> None:
    """Check that all ids are in [0, vocab_size); `name` is used in errors. Raises DataError."""
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        low, high = int(ids.min()), int(ids.max())
        raise DataError(
            f"token id outside the vocabulary; got {low if low < 0 else high}; expected 0 to {vocab_size - 1}; {name}. "
            "Set data.tokenizer to the tokenizer that made the ids."
        )


def open_shard(path: Path, name: str) -> Shard:
    """Memory-map one shard; `name` is used in errors. Raises DataError: not a shard, damaged or empty."""
    shard = _open_bin(path, name) if path.suffix == ".bin" else _open_npy(path, name)
    if not len(shard):
        raise DataError(f"token shard is empty; got 0 tokens; expected at least 1; {name}. Remove it.")
    return shard


def _open_npy(path: Path, name: str) -> Shard:
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"token shard is damaged or not a .npy file; got {name} ({error}); expected integers written by "
            "numpy.save. Write it again."
        ) from None
    if not isinstance(shard, np.ndarray) or shard.ndim != 1 or shard.dtype.kind not in "iu":
        got = f"{shard.dtype} {list(shard.shape)}" if isinstance(shard, np.ndarray) else type(shard).__name__
        raise DataError(
            f"token shard is not a one-dimensional array of ids; got {got}; expected integers; {name}. "
            "Write numpy.save(path, ids.astype(numpy.uint16))."
        )
    return shard.view(np.ndarray)  # slicing a numpy.memmap is four times slower


def _open_bin(path: Path, name: str) -> Shard:
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", min(_BIN_HEADER, size // 4))
    except OSError as error:
        raise DataError(f"token shard cannot be read; got {name} ({error}). Check its permissions.") from None
    expected = f"expected the magic number {_BIN_MAGIC} and version {_BIN_VERSION} of modded-nanogpt's format"
    if len(header) < _BIN_HEADER or header[0] != _BIN_MAGIC or header[1] != _BIN_VERSION:
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
    if not count:
        return np.zeros(0, np.uint16)
    return np.memmap(path, "<u2", "r", offset=4 * _BIN_HEADER, shape=(count,)).view(np.ndarray)
