"""Reading and writing of safetensors files, with strict validation.

The header is validated in plain Python before any tensor is read, and more strictly than by some loaders (MLX's
accepts overlaps, holes, duplicate names and trailing bytes). Data is read with plain file reads: if a file is
truncated while it is memory-mapped, SIGBUS kills the process.
"""

import hashlib
import math
import os
import weakref
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
    format_dtype,
    numpy_form,
    parse_header,
)
from moezoo.core.errors import CheckpointError
from moezoo.core.files import atomic_writer, open_regular, reason_of

Array = npt.NDArray[Any]

_ALIGNMENT_BYTES = 64  # required by JAX to use a NumPy buffer on the CPU without a copy


class SafetensorsFile:
    """A safetensors file with a validated header, read tensor by tensor.

    The file is closed between reads, or held open with `hold`: it can then be read after another process removed it.

    Fields:
        path: the file.
        header: the bytes of the header in the file, including padding, without the 8 bytes of its length.
        entries: the tensors by name, in the header's order.

    Validated: the header's length is within the file and the format's limit; it is UTF-8 JSON without duplicate
    keys; every entry has a known dtype, a shape and offsets, and no other keys; the offsets match dtype and shape;
    the tensors fill the file without holes, overlaps or trailing bytes.

    Raises CheckpointError that names the file and the first problem.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format.
    Differs: stricter than its parser: duplicate names and unknown keys of an entry are errors.
    """

    def __init__(self, path: str | Path, *, hold: bool = False):
        self.path = Path(path)
        self._held: int | None = None
        with self._open() as file:
            if hold:
                self._held = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._held)
            self._identity = _identity(file)
            try:
                self.header, self.entries = _read_header(file)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            except HeaderProblem as problem:
                raise CheckpointError(
                    f"{path} is not a valid safetensors file: {problem}. Download it again, or use another copy."
                ) from None

    def read(self, name: str, out: Array | None = None, rows: tuple[int, int] | None = None) -> Array:
        """Read one tensor as a NumPy array of the stored dtype.

        bfloat16 and float8 are returned as ml_dtypes arrays; F4 and F6 as bytes, uint8 [..., last size * bits / 8],
        or one-dimensional if a row does not end on a whole byte.

        Args:
            name: of the tensor.
            out: array to read into, contiguous and of the dtype and shape of the result; None: a new array.
            rows: half-open range (first, last) along the first axis; None: all rows.

        Raises CheckpointError: no such name, the file was changed since its header was read or is truncated while it
        is read, a shape that NumPy cannot hold, or a boolean that is neither 0 nor 1.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {name}; it has {len(self.entries)} others.")
        entry = self.entries[name]
        dtype, shape = numpy_form(entry)
        start, size = entry.start_byte, entry.size_bytes
        if rows is not None:
            first, last = rows
            assert 0 <= first <= last <= shape[0], (name, rows, shape)
            row_bytes = size // max(1, shape[0])
            start, size, shape = start + first * row_bytes, (last - first) * row_bytes, (last - first, *shape[1:])
        with self._open() as file:
            self._check_unchanged(file)
            # Read, not memory-mapped. If a file is truncated while it is mapped, SIGBUS kills the process, and mapped
            # pages are resident in addition to the array: a file of 2.1 GB takes 5 s either way, but 2.03 GiB of
            # memory when read, 2.35 when mapped, and 2.10 when each tensor's pages are released (MADV_DONTNEED).
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
                raise CheckpointError(f"{self.path} was truncated while {name} was read. Use another copy.")
            self._check_unchanged(file)
        if entry.dtype == "BOOL" and array.size and array.max() > 1:
            raise CheckpointError(f"{self.path}: {name} is BOOL, but contains a byte that is neither 0 nor 1.")
        if out is not None:
            return out
        try:
            return array.view(dtype).reshape(shape)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: NumPy cannot hold {name} of shape {list(entry.shape)!s:.80} ({error})."
            ) from None

    def _open(self) -> BinaryIO:
        if self._held is not None:
            return os.fdopen(os.dup(self._held), "rb", buffering=0)
        try:
            return open_regular(self.path)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _check_unchanged(self, file: BinaryIO) -> None:
        if _identity(file) != self._identity:
            raise CheckpointError(
                f"{self.path} was changed after it was opened. Load it again when no process writes to it."
            )


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return `np.empty` aligned to 64 bytes, so that JAX can use the buffer without a copy; NumPy aligns to 16."""
    size = math.prod(shape) * dtype.itemsize
    block = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT_BYTES
    array: Array = block[start : start + size].view(dtype).reshape(shape)
    return array


class LazyTensors(Mapping[str, Any]):
    """Mapping from names to arrays that loads an array only in `__getitem__`, which subclasses implement.

    Fields:
        shapes: shape by name, known without reading.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def stored(self, name: str) -> Any:
        """Return an array as it is stored: a `QuantizedWeight` in subclasses whose files have codes."""
        return self[name]

    def stored_bytes(self, name: str) -> int | None:
        """Return the bytes of codes, scales and biases of an array that `stored` returns as codes, else None."""
        return None

    def reader(self, name: str) -> Callable[[tuple[slice, ...]], Array]:
        """Return a function that reads a slice of an array, one slice per axis.

        The default reads the whole array; subclasses that can read parts override it.
        """
        whole: Array = self[name]
        return lambda part: whole[part]


class StoredTensors(LazyTensors):
    """Lazily read tensors of a safetensors file. `hold` and errors: as `SafetensorsFile`.

    Fields:
        dtypes: dtype by name, known without reading.
    """

    def __init__(self, path: str | Path, *, hold: bool = False):
        self._file = SafetensorsFile(path, hold=hold)
        forms = {name: numpy_form(entry) for name, entry in self._file.entries.items()}
        super().__init__({name: shape for name, (_, shape) in forms.items()})
        self.dtypes = {name: dtype for name, (dtype, _) in forms.items()}

    def __getitem__(self, name: str) -> Array:
        if name not in self.shapes:
            raise KeyError(name)
        return self._file.read(name)


def write_tensors(path: str | Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write a safetensors file atomically and return its size in bytes and its SHA-256.

    `metadata` maps names to free text, `{}` for none. The same tensors and metadata always produce the same bytes. The
    digest is computed from the data in memory, not by reading the file back. A lazy mapping with attributes `shapes`
    and `dtypes` is read one tensor at a time.

    Raises CheckpointError for a dtype that the format or NumPy does not support, and RunError if the file cannot be
    written.
    """
    dtypes: Mapping[str, np.dtype[Any]] | None = getattr(tensors, "dtypes", None)
    dtypes = {name: array.dtype for name, array in tensors.items()} if dtypes is None else dtypes
    forms = {name: (format_dtype(name, dtypes[name]), shape) for name, shape in shapes_of(tensors).items()}
    header = encode_header(forms, metadata)
    length = len(header).to_bytes(8, "little")
    digest = hashlib.sha256(length + header)
    entries, size = parse_header(header)

    def in_order() -> Iterator[tuple[str, Array]]:
        for name in entries:
            array = _encodable(name, tensors[name])
            digest.update(array.reshape(-1).view(np.uint8).data)
            yield name, array

    write_stream(path, header, in_order())
    return size, digest.hexdigest()


def shapes_of(weights: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array by name.

    The shapes of a lazy mapping come from its attribute `shapes`, so that no array is read.
    """
    shapes: Mapping[str, tuple[int, ...]] | None = getattr(weights, "shapes", None)
    return {name: value.shape for name, value in weights.items()} if shapes is None else dict(shapes)


def write_stream(path: str | Path, header: bytes, tensors: Iterable[tuple[str, Array]]) -> None:
    """Write a safetensors file with a given header atomically, with one tensor in memory at a time.

    `header` is the header's JSON, from `SafetensorsFile.header` or `encode_header`. `tensors` yields each name of the
    header once, in any order, with an array of its dtype and shape (F4 and F6: of the bytes).

    Raises CheckpointError: an invalid header, a missing, unexpected or duplicate name, a different dtype or shape.
    Raises RunError if the file cannot be written. After an error the old file is unchanged.
    """
    try:
        entries, size = parse_header(header)
    except HeaderProblem as problem:
        raise CheckpointError(f"cannot write {path}: {problem}.") from None
    missing = set(entries)
    with atomic_writer(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.truncate(size)
        for name, value in tensors:
            if name not in missing:
                what = "appears twice" if name in entries else "is not in the header"
                raise CheckpointError(f"cannot write {path}: {name} {what}.")
            missing.remove(name)
            array, (dtype, shape) = _encodable(name, value), numpy_form(entries[name])
            if (array.dtype, array.shape) != (dtype, shape):
                raise CheckpointError(
                    f"cannot write {path}: {name} is {array.dtype} {list(array.shape)}; expected {dtype} "
                    f"{list(shape)} according to the header."
                )
            file.seek(entries[name].start_byte)
            file.write(array.reshape(-1).view(np.uint8).data)
        if missing:
            raise CheckpointError(f"cannot write {path}: tensors {', '.join(sorted(missing)[:5])} are missing.")


def _encodable(name: str, array: Array) -> Array:
    format_dtype(name, array.dtype)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(array.shape)  # Trap: ascontiguousarray makes a scalar [1]


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: {reason_of(error)}.")


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _read_header(file: BinaryIO) -> tuple[bytes, dict[str, TensorEntry]]:
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < 8:
        raise HeaderProblem(f"it has {file_bytes} bytes, but the length of the header already takes 8")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise HeaderProblem(f"its header has {header_bytes} bytes; the format allows at most {MAX_HEADER_BYTES}")
    if header_bytes > file_bytes - 8:
        raise HeaderProblem(f"its header has {header_bytes} bytes, but only {file_bytes - 8} follow (truncated?)")
    text = file.read(header_bytes)
    if len(text) != header_bytes:
        raise HeaderProblem("it was truncated while it was read")
    entries, end = parse_header(text)
    if end != file_bytes:
        raise HeaderProblem(f"its tensors end at byte {end}, but the file has {file_bytes} (truncated or too long?)")
    return text, entries


def _bytes_of(out: Array, dtype: np.dtype[Any], shape: tuple[int, ...], path: Path, name: str) -> Array:
    if (out.dtype, out.shape) != (dtype, shape) or not out.flags.c_contiguous or not out.flags.writeable:
        raise CheckpointError(
            f"{path}: {name} is {dtype} {list(shape)} and cannot be read into {out.dtype} {list(out.shape)}; "
            "expected a writable, contiguous array of its dtype and shape."
        )
    return out.reshape(-1).view(np.uint8)


def _read_into(file: BinaryIO, start: int, array: Array) -> int:
    """Fill `array` with the bytes of the file from `start` and return the number of bytes read."""
    view, done = array.data, 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], start + done)  # Linux reads at most 2 GiB at once
        if not count:
            break
        done += count
    return done
