"""Batches that somebody else has made: a file of token ids, one batch a step, in the file's order.

A row is a whole sequence: its T tokens are T inputs and T - 1 targets, since nothing follows the last. That is how
Hugging Face's trainers count, so their losses can be compared with ours. Writing: writings/data.md.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.config.data import BatchesSource
from moezoo.core.config.training import TrainingConfig
from moezoo.core.data.source_files import find_files
from moezoo.core.data.token_store import check_range, local_copy
from moezoo.core.data.tokenizers import Ids
from moezoo.core.errors import DataError
from moezoo.core.tokens import IGNORED

_Ids3 = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ReadyBatches:
    """The part of a file's batches that belongs to a split: [S, B, T], read when asked for. As `data.Split`.

    Fields:
        name: of the split.
        source: where the batches are from, for errors.
        ids: integer [S, B, T].
        vocab_size: every id is below it.
    """

    name: str
    source: str
    ids: _Ids3
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all batches together."""
        return int(self.ids.size)

    def check(self, training: TrainingConfig) -> None:
        """Raises DataError where a run needs other or more batches than there are."""
        steps, batch_size, sequence_length = self.ids.shape
        for key, given, here in (
            ("batch_size", training.batch_size, batch_size),
            ("sequence_length", training.sequence_length, sequence_length),
        ):
            if given != here:
                raise DataError(
                    f"training.{key} is {given}, but the batches of {self.source} are [{batch_size}, "
                    f"{sequence_length}]. Use {here}."
                )
        if training.steps > steps:
            raise DataError(
                f"training.steps is {training.steps}, but {self.source} has {steps} batches to train on, one a step. "
                f"Use steps <= {steps}."
            )

    def batch(
        self,
        step: int,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> Ids:
        """The file's batch of a step: int32 [B, T + 1], whose last column is IGNORED; as `Split.batch`."""
        del seed  # the order is the file's
        if not 0 <= step < len(self.ids) or (batch_size, sequence_length) != self.ids.shape[1:]:
            raise DataError(
                f"there is no such batch; got step {step}, [{batch_size}, {sequence_length}]; expected one of "
                f"{list(self.ids.shape)}; {self.source}."
            )
        return self._with_targets(self.ids[step] if rows is None else self.ids[step][rows])

    def windows(self, sequence_length: int, count: int | None = None) -> Ids:
        """Rows in order, `count` of them spread evenly (None: all): int32 [n, T + 1]; as `Split.windows`."""
        rows = self.ids.reshape(-1, self.ids.shape[-1])
        if sequence_length != rows.shape[1]:
            raise DataError(
                f"training.sequence_length is {sequence_length}, but a row of {self.source} has {rows.shape[1]} "
                f"tokens. Use {rows.shape[1]}."
            )
        count = len(rows) if count is None else min(count, len(rows))
        return self._with_targets(rows[np.arange(count) * len(rows) // count])

    def _with_targets(self, rows: _Ids3) -> Ids:
        check_range(rows, self.vocab_size, self.source)
        return np.pad(rows.astype(np.int32), ((0, 0), (0, 1)), constant_values=IGNORED)


def open_batches(source: BatchesSource, vocab_size: int, name: str, where: str) -> tuple[ReadyBatches, ReadyBatches]:
    """The batches to train on and those to validate with; `name` and `where` stand in errors.

    The file's last `validation_batches` are held out. Where there are none, validation measures the first batch.

    Raises DataError: no such file or member, damaged, not integers [steps, B, T], ids outside the vocabulary in the
    first batch (the others are checked as they are read).
    """
    ids = _read(source, name, where)
    kept = len(ids) - source.validation_batches
    if kept < 1:
        raise DataError(
            f"{name} has {len(ids)} batches; got validation_batches {source.validation_batches}, which leaves none to "
            f"train on ({where}). Use less."
        )
    held_out = ids[kept:] if source.validation_batches else ids[:1]
    check_range(ids[0], vocab_size, name)
    return ReadyBatches("training", name, ids[:kept], vocab_size), ReadyBatches(
        "validation", name, held_out, vocab_size
    )


def _read(source: BatchesSource, name: str, where: str) -> _Ids3:
    files = find_files(source.path, (".npy", ".npz"), where)
    if len(files) != 1:
        raise DataError(f"{name} is {len(files)} files; expected one; {where}. Name the file.")
    path = local_copy(files[0])
    try:
        array = _member(path, source.key, name) if path.suffix == ".npz" else _alone(path, source.key, name)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{name} is damaged or not a .npy or .npz file; got {type(error).__name__}: {error}; expected integers as "
            "numpy.save or numpy.savez writes them. Write it again."
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{name} holds no batches; got {got}; expected integers [steps, batch, length]. Reshape it.")
    if array.shape[-1] < 2:
        raise DataError(f"{name} has rows of one token, behind which nothing is predicted; expected at least two.")
    return array.view(np.ndarray)


def _alone(path: Path, key: str | None, name: str) -> Any:
    if key is not None:
        raise DataError(f"{name} is a .npy file, which has no members; got key {key!r}. Leave it out.")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _member(path: Path, key: str | None, name: str) -> Any:
    if not zipfile.is_zipfile(path):  # Trap: numpy.load would try .npy, and leaves a damaged file open
        raise ValueError("it is no zip file")
    with np.load(path, allow_pickle=False) as file:
        if key is None and len(file.files) == 1:
            return file[file.files[0]]
        if key not in file.files:
            raise DataError(f"{name} has the members {', '.join(file.files)}; got key {key!r}. Name one of them.")
        return file[key]
