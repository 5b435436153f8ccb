"""Precomputed batches from a file of token ids, one batch per step in file order.

A row is a whole sequence: its T tokens are T inputs and T - 1 targets, since the last token has no successor. Hugging
Face's trainers count in the same way, so losses are comparable. Writing: writings/data.md.
"""

import hashlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moezoo.core.config.data import BatchesSource
from moezoo.core.config.training import TrainingConfig
from moezoo.core.data.batch import Positions, row_positions
from moezoo.core.data.npz_file import ZIP_ERRORS, load_npz
from moezoo.core.data.source_files import find_files, suffix_of
from moezoo.core.data.token_cache import local_copy
from moezoo.core.data.token_shards import IdFile, IntegerArray, check_range, open_npy
from moezoo.core.data.tokenizers import Ids
from moezoo.core.errors import DataError
from moezoo.core.files import reason_of
from moezoo.core.progress import Message, Progress
from moezoo.core.tokens import IGNORED


@dataclass(frozen=True)
class PrebatchedSplit:
    """Training or validation split of precomputed batches, read lazily; same interface as `prepare.Split`.

    Fields:
        name: name of the split.
        source: origin of the batches, for errors.
        ids: all batches of the source, integer [batches, B, T]: a file, or an array in memory.
        first: index of the split's first batch.
        steps: number of its batches.
        vocab_size: exclusive upper bound of the ids.
    """

    name: str
    source: str
    ids: IdFile | IntegerArray
    first: int
    steps: int
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all batches."""
        return self.steps * math.prod(self.ids.shape[1:])

    @property
    def num_sources(self) -> int:
        """Number of sources: the file alone."""
        return 1

    @property
    def source_names(self) -> str:
        """Spec: Split.source_names."""
        return self.source

    def digest(self) -> str:
        """Return a digest of all batches; see `IdFile.digest`."""
        return self.ids.digest() if isinstance(self.ids, IdFile) else hashlib.sha256(self.ids.tobytes()).hexdigest()

    def check(self, training: TrainingConfig) -> None:
        """Check that sizes and number of batches match the config. Raises DataError."""
        _, batch_size, sequence_length = self.ids.shape
        for key, configured, found in (
            ("batch_size", training.batch_size, batch_size),
            ("sequence_length", training.sequence_length, sequence_length),
        ):
            if configured != found:
                raise DataError(
                    f"training.{key} is {configured}, but the batches of {self.source} are [{batch_size}, "
                    f"{sequence_length}]. Use {found}."
                )
        if training.steps > self.steps:
            raise DataError(
                f"training.steps is {training.steps}, but {self.source} has {self.steps} training batches, one per "
                f"step. Use steps <= {self.steps}."
            )

    def batch(
        self,
        step: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Ids:
        """Return the batch of a step: int32 [B, T + 1], whose last column is IGNORED; see `Split.batch`."""
        del seed  # batches are in file order
        shape = (self.steps, *self.ids.shape[1:])
        if not 0 <= step < self.steps or (batch_size, sequence_length) != self.ids.shape[1:]:
            raise DataError(
                f"there is no such batch; got step {step}, [{batch_size}, {sequence_length}]; expected a step of "
                f"[steps, batch, length] = {list(shape)}; {self.source}. Use the sizes of the file."
            )
        return self._read(step * batch_size + (np.arange(batch_size) if rows is None else rows))

    def positions(
        self,
        step: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Positions:
        """Return the positions of the inputs of a batch, in the rows one after the other."""
        del seed
        return row_positions(step * batch_size + (np.arange(batch_size) if rows is None else rows), sequence_length)

    def windows(self, sequence_length: int, count: int | None = None) -> Ids:
        """Return rows in order, all or `count` evenly spaced: int32 [n, T + 1]; see `Split.windows`."""
        _, batch_size, length = self.ids.shape
        if sequence_length != length:
            raise DataError(
                f"training.sequence_length is {sequence_length}, but a row of {self.source} has {length} tokens. "
                f"Use {length}."
            )
        total = self.steps * batch_size
        count = total if count is None else min(count, total)
        return self._read(np.arange(count) * total // count)

    def num_windows(self, sequence_length: int) -> int:
        """Return the number of rows; see `Split.num_windows`."""
        del sequence_length
        return self.steps * self.ids.shape[1]

    def _read(self, rows: npt.NDArray[np.int64]) -> Ids:
        """Read rows, counted from the split's first batch, and append the column of targets that do not exist."""
        _, batch_size, length = self.ids.shape
        rows = rows + self.first * batch_size
        if isinstance(self.ids, IdFile):
            with self.ids.opened() as read:
                found: IntegerArray = np.stack([read(row * length, length) for row in rows.tolist()])
        else:
            found = self.ids.reshape(-1, length)[rows]
        check_range(found, self.vocab_size, self.source)
        return np.pad(found.astype(np.int32), ((0, 0), (0, 1)), constant_values=IGNORED)


def open_prebatched(
    source: BatchesSource,
    vocab_size: int,
    name: str,
    where: str,
    on_progress: Progress | None = None,
    on_message: Message = warnings.warn,
) -> tuple[PrebatchedSplit, PrebatchedSplit]:
    """Open a file of batches and return its training and validation splits; `name` and `where` are used in errors.

    The last `validation_batches` are held out. If that is 0, the first batch is the validation split.

    Raises DataError: no such file or array, damaged, not integers [steps, B, T], ids outside the vocabulary in the
    first batch (the others are checked when they are read).
    """
    ids = _open(source, name, where, on_progress, on_message)
    num_train = len(ids) - source.validation_batches
    if num_train < 1:
        raise DataError(
            f"{name} has {len(ids)} batches; got validation_batches {source.validation_batches}, which leaves none for "
            f"training ({where}). Use fewer."
        )
    held_out = (num_train, source.validation_batches) if source.validation_batches else (0, 1)
    train = PrebatchedSplit("training", name, ids, 0, num_train, vocab_size)
    train.batch(0, ids.shape[1], ids.shape[2], seed=0)  # ids in range
    return train, PrebatchedSplit("validation", name, ids, *held_out, vocab_size)


def _open(
    source: BatchesSource, name: str, where: str, on_progress: Progress | None, on_message: Message
) -> IdFile | IntegerArray:
    files = find_files(source.path, (".npy", ".npz"), where)
    if len(files) != 1:
        raise DataError(f"{name} is {len(files)} files; expected one; {where}. Use the path of one file.")
    path = local_copy(files[0], on_progress, on_message)
    ids: IdFile | IntegerArray
    try:
        ids = load_npz(path, source.key, name) if suffix_of(path) == ".npz" else _open_npy(path, source.key, name)
    except (OSError, ValueError, *ZIP_ERRORS) as error:
        raise DataError(
            f"{name} is damaged or not a .npy or .npz file; got: {reason_of(error)}; expected integers written by "
            "numpy.save or numpy.savez. Write it again."
        ) from None
    if len(ids.shape) != 3 or 0 in ids.shape:
        got = f"{ids.dtype} {list(ids.shape)}"
        raise DataError(f"{name} has no batches; got {got}; expected integers [steps, batch, length]. Reshape it.")
    if ids.shape[-1] < 2:
        raise DataError(f"{name} has rows of one token, which have no targets; expected at least two. Use longer rows.")
    return ids


def _open_npy(path: Path, key: str | None, name: str) -> IdFile:
    if key is not None:
        raise DataError(f"{name} is a .npy file, which has only one array; got key {key!r:.80}. Remove the key.")
    return open_npy(path, name)
