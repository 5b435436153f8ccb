"""Safetensors files, checked before they are believed.

The header is checked in plain Python before any tensor is read, and more strictly than some loaders do (MLX's
accepts overlaps, holes, duplicate names and trailing bytes). Data is read by plain file reads: a file that is
truncated while it is mapped into memory would kill the process with SIGBUS.
"""

import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_header import (
    MAX_HEADER_BYTES,
    HeaderProblem,
    TensorEntry,
    encode_header,
    laid_out,
    numpy_form,
    storable_name,
)
from moezoo.core.errors import CheckpointError
from moezoo.core.files import written_atomically

Array = npt.NDArray[Any]

_ALIGNMENT_BYTES = 64  # what JAX asks of a buffer on the CPU that it takes over without a copy


class SafetensorsFile:
    """A safetensors file whose header was checked, to be read tensor by tensor; it stays closed in between.

    Fields:
        path: the file.
        header: the header's bytes as they stand in the file, its padding included and its length excluded.
        entries: the tensors by name, in the header's order.

    Checked: the header's length fits the file and the format's limit; it is UTF-8 JSON without duplicate
    keys; every entry has a known dtype, a shape and offsets, and nothing else; offsets span exactly what
    dtype and shape need; the tensors fill the file without a hole, an overlap or a trailing byte.

    Raises CheckpointError that names the file and the first problem.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format.
    Differs: stricter than its parser in that a duplicate name and an entry's unknown keys are refused.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._opened() as file:
            self._identity = _identity(file)
            try:
                self.header, self.entries = _checked(file)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            except HeaderProblem as problem:
                raise CheckpointError(
                    f"{path} is not a whole safetensors file: {problem}. Fetch it again, or use another copy."
                ) from None

    def read(self, name: str, out: Array | None = None, rows: tuple[int, int] | None = None) -> Array:
        """One tensor as a NumPy array of the stored dtype, into `out` (contiguous, of its dtype and shape) if given.

        `rows`: only those from the first up to, without, the second along the first axis of that array.
        bfloat16 and float8 come as ml_dtypes arrays; F4 and F6 as their bytes, uint8 [..., last size * bits / 8],
        or flat where a row does not end on a whole byte.

        Raises CheckpointError: no such name, the file was changed since its header was checked or ends while it
        is read, a shape that NumPy cannot hold, or a boolean that is neither 0 nor 1.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.path} lacks {name}; it holds {len(self.entries)} other tensors.")
        entry = self.entries[name]
        dtype, shape = numpy_form(entry)
        start, size = entry.start_byte, entry.size_bytes
        if rows is not None:
            first, last = rows
            assert 0 <= first <= last <= shape[0], (name, rows, shape)
            row_bytes = size // max(1, shape[0])
            start, size, shape = start + first * row_bytes, (last - first) * row_bytes, (last - first, *shape[1:])
        with self._opened() as file:
            self._unchanged(file)
            # Read, not mapped. A file that is cut while it is mapped kills the process with SIGBUS, and mapped pages
            # are resident beside the array: a file of 2.1 GB takes 5 s either way, but 2.03 GiB of memory when read,
            # 2.35 when mapped, and 2.10 when each tensor's pages are given back (MADV_DONTNEED).
            array = (
                aligned_empty((size,), np.dtype(np.uint8))
                if out is None
                else _bytes_of(out, dtype, shape, self.path, name)
            )
            try:
                count = _read_into(file, start, array)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if count != size:
                raise CheckpointError(f"{self.path} became shorter while {name} was read. Nothing of it is used.")
            self._unchanged(file)
        if entry.dtype == "BOOL" and array.size and array.max() > 1:
            raise CheckpointError(f"{self.path}: {name} is BOOL, but holds a byte that is neither 0 nor 1.")
        if out is not None:
            return out
        try:
            return array.view(dtype).reshape(shape)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: NumPy cannot hold {name} of shape {list(entry.shape)} ({error})."
            ) from None

    def _opened(self) -> BinaryIO:
        try:
            # Without O_NONBLOCK, opening a pipe waits for its other end.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            raise _unreadable(self.path, error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise CheckpointError(f"cannot read {self.path}: it is a directory, a device or a pipe.")
        return os.fdopen(descriptor, "rb", buffering=0)

    def _unchanged(self, file: BinaryIO) -> None:
        if _identity(file) != self._identity:
            raise CheckpointError(f"{self.path} was changed after it was opened. Load it again when nothing writes it.")


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """`np.empty` where a backend can take it over: JAX needs 64 bytes, NumPy gives 16."""
    size = math.prod(shape) * dtype.itemsize
    block = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT_BYTES
    array: Array = block[start : start + size].view(dtype).reshape(shape)
    return array


def check_header(path: str | Path) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file holds, by name, after a check of its header alone: see `SafetensorsFile`."""
    return SafetensorsFile(path).entries


class ReadWhenAsked(Mapping[str, Any]):
    """Arrays by name, of which `__getitem__`, which is the heir's, makes one. Nothing else does.

    Fields:
        shapes: by name, known without reading.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def reader(self, name: str) -> Callable[[tuple[slice, ...]], Array]:
        """What gives parts of an array, by a slice of each axis; an heir that can read a part alone does so."""
        whole: Array = self[name]
        return lambda part: whole[part]


class StoredTensors(ReadWhenAsked):
    """The tensors of a safetensors file. Raises as `SafetensorsFile` does.

    Fields:
        dtypes: by name, known without reading.
    """

    def __init__(self, path: str | Path):
        self._file = SafetensorsFile(path)
        forms = {name: numpy_form(entry) for name, entry in self._file.entries.items()}
        super().__init__({name: shape for name, (_, shape) in forms.items()})
        self.dtypes = {name: dtype for name, (dtype, _) in forms.items()}

    def __getitem__(self, name: str) -> Array:
        if name not in self.shapes:
            raise KeyError(name)
        return self._file.read(name)


def write_tensors(path: str | Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write a safetensors file, all or nothing, and return its size in bytes and its SHA-256.

    `metadata` is free text by name, `{}` for none. The same tensors and metadata always give the same bytes. The digest
    is of what was meant, in memory, and not of what a reading back gives. A mapping that reads its arrays when they are
    asked for, and says `shapes` and `dtypes` without reading, is never in memory whole.

    Raises CheckpointError for a dtype that the format or NumPy cannot hold, and RunError where the file cannot be
    written.
    """
    dtypes: Mapping[str, np.dtype[Any]] | None = getattr(tensors, "dtypes", None)
    dtypes = {name: array.dtype for name, array in tensors.items()} if dtypes is None else dtypes
    forms = {name: (storable_name(name, dtypes[name]), shape) for name, shape in shapes_of(tensors).items()}
    header = encode_header(forms, metadata)
    length = len(header).to_bytes(8, "little")
    digest = hashlib.sha256(length + header)
    entries, size = laid_out(header)

    def in_order() -> Iterator[tuple[str, Array]]:
        for name in entries:
            array = _encodable(name, tensors[name])
            digest.update(array.reshape(-1).view(np.uint8).data)
            yield name, array

    write_stream(path, header, in_order())
    return size, digest.hexdigest()


def shapes_of(weights: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Each array's shape by name.

    A mapping that reads its arrays when they are asked for (and has its own `__contains__`) says their shapes in an
    attribute `shapes`, so that nothing is read here.
    """
    shapes: Mapping[str, tuple[int, ...]] | None = getattr(weights, "shapes", None)
    return {name: value.shape for name, value in weights.items()} if shapes is None else dict(shapes)


def write_stream(path: str | Path, header: bytes, tensors: Iterable[tuple[str, Array]]) -> None:
    """Write a safetensors file of a given header, one tensor in memory at a time: whole, or not at all.

    `header` is text as `SafetensorsFile.header` has it, or `encode_header` makes it. `tensors` gives each of its
    names once, in any order, with an array of its dtype and shape (F4 and F6: of the bytes).

    Raises CheckpointError: a header that is not one, a name too few, too many or twice, another dtype or shape.
    Raises RunError where the file cannot be written. What was there before is then untouched.
    """
    try:
        entries, size = laid_out(header)
    except HeaderProblem as problem:
        raise CheckpointError(f"cannot write {path}: {problem}.") from None
    missing = set(entries)
    with written_atomically(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.truncate(size)
        for name, given in tensors:
            if name not in missing:
                what = "was given twice" if name in entries else "is not in the header"
                raise CheckpointError(f"cannot write {path}: {name} {what}.")
            missing.remove(name)
            array, (dtype, shape) = _encodable(name, given), numpy_form(entries[name])
            if (array.dtype, array.shape) != (dtype, shape):
                raise CheckpointError(
                    f"cannot write {path}: {name} is {array.dtype} {list(array.shape)}; its header says {dtype} "
                    f"{list(shape)}."
                )
            file.seek(entries[name].start_byte)
            file.write(array.reshape(-1).view(np.uint8).data)
        if missing:
            raise CheckpointError(f"cannot write {path}: {', '.join(sorted(missing)[:5])} missing.")


def _encodable(name: str, array: Array) -> Array:
    storable_name(name, array.dtype)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(array.shape)  # Trap: ascontiguousarray makes a scalar [1]


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: {(getattr(error, 'strerror', None) or str(error)).lower()}.")


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _checked(file: BinaryIO) -> tuple[bytes, dict[str, TensorEntry]]:
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < 8:
        raise HeaderProblem(f"it has {file_bytes} bytes, and the header's length alone takes 8")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise HeaderProblem(f"its header claims {header_bytes} bytes, and the format allows {MAX_HEADER_BYTES}")
    if header_bytes > file_bytes - 8:
        raise HeaderProblem(f"its header claims {header_bytes} bytes, but only {file_bytes - 8} follow (cut short?)")
    text = file.read(header_bytes)
    if len(text) != header_bytes:
        raise HeaderProblem("it became shorter while it was read")
    entries, end = laid_out(text)
    if end != file_bytes:
        raise HeaderProblem(f"its tensors end at byte {end}, but the file has {file_bytes} (cut or too long?)")
    return text, entries


def _bytes_of(out: Array, dtype: np.dtype[Any], shape: tuple[int, ...], path: Path, name: str) -> Array:
    if (out.dtype, out.shape) != (dtype, shape) or not out.flags.c_contiguous or not out.flags.writeable:
        raise CheckpointError(
            f"{path}: {name} is {dtype} {list(shape)} and cannot be read into {out.dtype} {list(out.shape)}; "
            "expected a writeable, contiguous array of its dtype and shape."
        )
    return out.reshape(-1).view(np.uint8)


def _read_into(file: BinaryIO, start: int, array: Array) -> int:
    """Fill `array` from the file's byte `start` on; how many bytes there were."""
    file.seek(start)
    view, done = array.data, 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]  # Linux reads at most 2 GiB at once
        if not count:
            break
        done += count
    return done
