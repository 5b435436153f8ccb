"""Safetensors files, checked before they are believed.

The header is checked in plain Python before any tensor is read, and more strictly than some loaders do (MLX's
accepts overlaps, holes, duplicate names and trailing bytes). Data is read by plain file reads: a file that is
truncated while it is mapped into memory would kill the process with SIGBUS.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import CheckpointError
from moezoo.core.files import written_atomically

Array = npt.NDArray[Any]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_ALIGNMENT_BYTES = 64  # what JAX asks of a buffer on the CPU that it takes over without a copy

# Bits of one element, by the format's own names, narrow to wide in the order of the format's own list.
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_RANK = {name: rank for rank, name in enumerate(_BITS)}

# What NumPy can hold, alone or with ml_dtypes (which jax brings along): the format's name to NumPy's.
_NUMPY_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
    "F64": "float64",
}
_ML_DTYPES_NAMES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_FORMAT_NAMES = {numpy_name: name for name, numpy_name in (_NUMPY_NAMES | _ML_DTYPES_NAMES).items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: the format's dtype name (`F32`, `BF16`), its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start_byte: int  # from the beginning of the file
    size_bytes: int


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
            except _Refused as problem:
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
        dtype, shape = _numpy_form(entry)
        start, size = entry.start_byte, entry.size_bytes
        if rows is not None:
            first, last = rows
            assert 0 <= first <= last <= shape[0], (name, rows, shape)
            row_bytes = size // max(1, shape[0])
            start, size, shape = start + first * row_bytes, (last - first) * row_bytes, (last - first, *shape[1:])
        with self._opened() as file:
            self._unchanged(file)
            # Read, not mapped: a file that is cut while it is mapped kills the process with SIGBUS, and mapped pages
            # count as resident beside the parameter that is made from them. Measured: tests/external/measure_memory.py.
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


def read_tensors(path: str | Path, names: Iterable[str] | None = None) -> dict[str, Array]:
    """Tensors of a safetensors file as NumPy arrays of the stored dtype, the header checked first.

    `names` chooses some (all, in the file's order, by default). Raises CheckpointError as `SafetensorsFile` does.
    """
    file = SafetensorsFile(path)
    wanted = list(file.entries) if names is None else list(names)
    missing = [name for name in wanted if name not in file.entries]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; it holds {len(file.entries)} other tensors.")
    return {name: file.read(name) for name in wanted}


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
    forms = {name: (_storable(name, dtypes[name]), shape) for name, shape in shapes_of(tensors).items()}
    header = encode_header(forms, metadata)
    length = len(header).to_bytes(8, "little")
    digest = hashlib.sha256(length + header)
    entries, size = _laid_out(header)

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


def encode_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; see `write_tensors`."""
    arrays = {name: _encodable(name, array) for name, array in tensors.items()}
    header = encode_header({name: (format_name(array.dtype), array.shape) for name, array in arrays.items()}, metadata)
    entries, _ = _laid_out(header)
    blocks = (arrays[name].reshape(-1).view(np.uint8).data for name in entries)
    return b"".join([len(header).to_bytes(8, "little"), header, *blocks])


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header, for `write_stream`, of a file of these tensors (the format's dtype name, shape); without its length.

    Wider dtypes come first, so that every tensor is aligned, then names in order: as safetensors itself
    orders them.
    Differs: safetensors 0.8 writes the metadata in an order that changes from run to run; here it is sorted.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in sorted(tensors, key=lambda name: (-_RANK[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        end = position + size_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"a tensor name or metadata is not valid Unicode: {error.reason}.") from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"the header would have {len(text)} bytes; the format allows {MAX_HEADER_BYTES}.")
    return text


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes in a file."""
    return _BITS[dtype] * math.prod(shape) // 8


def format_name(dtype: np.dtype[Any]) -> str:
    """The format's name (`F32`, `BF16`) of a NumPy dtype; KeyError where it has none."""
    return _FORMAT_NAMES[dtype.name]


def write_stream(path: str | Path, header: bytes, tensors: Iterable[tuple[str, Array]]) -> None:
    """Write a safetensors file of a given header, one tensor in memory at a time: whole, or not at all.

    `header` is text as `SafetensorsFile.header` has it, or `encode_header` makes it. `tensors` gives each of its
    names once, in any order, with an array of its dtype and shape (F4 and F6: of the bytes).

    Raises CheckpointError: a header that is not one, a name too few, too many or twice, another dtype or shape.
    Raises RunError where the file cannot be written. What was there before is then untouched.
    """
    try:
        entries, size = _laid_out(header)
    except _Refused as problem:
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
            array, (dtype, shape) = _encodable(name, given), _numpy_form(entries[name])
            if (array.dtype, array.shape) != (dtype, shape):
                raise CheckpointError(
                    f"cannot write {path}: {name} is {array.dtype} {list(array.shape)}; its header says {dtype} "
                    f"{list(shape)}."
                )
            file.seek(entries[name].start_byte)
            file.write(array.reshape(-1).view(np.uint8).data)
        if missing:
            raise CheckpointError(f"cannot write {path}: {', '.join(sorted(missing)[:5])} missing.")


def _storable(name: str, dtype: np.dtype[Any]) -> str:
    """The format's name of a tensor's dtype. Raises CheckpointError where it cannot be stored."""
    if name == "__metadata__":
        raise CheckpointError("a tensor cannot be named __metadata__: the format keeps that name for metadata.")
    if dtype.name not in _FORMAT_NAMES:
        known = ", ".join(_FORMAT_NAMES)
        raise CheckpointError(f"{name} has dtype {dtype}, which cannot be stored; expected one of {known}.")
    return format_name(dtype)


def _encodable(name: str, array: Array) -> Array:
    _storable(name, array.dtype)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(array.shape)  # Trap: ascontiguousarray makes a scalar [1]


class _Refused(Exception):
    """What is wrong with a header, without the file's name."""


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    return CheckpointError(f"cannot read {path}: {(getattr(error, 'strerror', None) or str(error)).lower()}.")


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _checked(file: BinaryIO) -> tuple[bytes, dict[str, TensorEntry]]:
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < 8:
        raise _Refused(f"it has {file_bytes} bytes, and the header's length alone takes 8")
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise _Refused(f"its header claims {header_bytes} bytes, and the format allows {MAX_HEADER_BYTES}")
    if header_bytes > file_bytes - 8:
        raise _Refused(f"its header claims {header_bytes} bytes, but only {file_bytes - 8} follow (cut short?)")
    text = file.read(header_bytes)
    if len(text) != header_bytes:
        raise _Refused("it became shorter while it was read")
    entries, end = _laid_out(text)
    if end != file_bytes:
        raise _Refused(f"its tensors end at byte {end}, but the file has {file_bytes} (cut or too long?)")
    return text, entries


def _laid_out(text: bytes) -> tuple[dict[str, TensorEntry], int]:
    """The tensors of a header, and the size of a file that has exactly them."""
    header = _parsed(text)
    header.pop("__metadata__", None)
    data_start = 8 + len(text)
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start_byte, item[1].size_bytes)):
        if entry.start_byte != position:
            what = "overlaps the tensor before it" if entry.start_byte < position else "leaves a hole before it"
            raise _Refused(f"{name!r} {what} (it starts at byte {entry.start_byte}; expected {position})")
        position += entry.size_bytes
    return entries, position


def _parsed(text: bytes) -> dict[str, Any]:
    """The header's JSON object, without what Python's parser lets pass: duplicates, NaN, other encodings."""
    if not text.startswith(b"{"):
        raise _Refused("its header does not begin with '{'")

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise _Refused(f"its header has the key {name!r:.80} twice")
            found[name] = value
        return found

    def no_constant(name: str) -> None:
        raise _Refused(f"its header has {name}, which is not JSON")

    def natural(digits: str) -> int:
        if digits.startswith("-"):  # Trap: -0 would pass as 0, and other parsers refuse it
            raise _Refused(f"its header has the negative number {digits:.80}")
        return int(digits)

    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=without_duplicates,
            parse_constant=no_constant,
            parse_int=natural,
        )
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # Trap: a lone surrogate passes the parser
    except (ValueError, RecursionError) as error:
        raise _Refused(f"its header is not UTF-8 JSON ({type(error).__name__})") from None
    assert isinstance(header, dict)  # it begins with '{'
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Refused("its __metadata__ is not a map from text to text")
    return header


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"the entry of {name!r} is not {{dtype, shape, data_offsets}}; got {value!r:.80}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Refused(f"the dtype of {name!r} is unknown; got {dtype!r:.80}")
    if not _are_sizes(shape):
        raise _Refused(f"the shape of {name!r} is not a list of sizes; got {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _Refused(f"the data_offsets of {name!r} are not two positions; got {offsets!r:.80}")
    total_bits = _BITS[dtype]
    for size in shape:
        total_bits *= size
        if total_bits >= 1 << 64:  # Trap: [2**40, 2**40, 0] holds nothing, and overflows every loader
            raise _Refused(f"the shape of {name!r} is impossibly large; got {shape!r:.80}")
    if total_bits % 8:
        raise _Refused(f"{name!r} does not end on a whole byte: {total_bits} bits")
    start, end = offsets
    if end - start != total_bits // 8:
        raise _Refused(f"{name!r} is {dtype} {shape} and needs {total_bits // 8} bytes, but has offsets {offsets}")
    return TensorEntry(dtype, tuple(shape), data_start + start, total_bits // 8)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _numpy_form(entry: TensorEntry) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype and shape in which NumPy holds a tensor."""
    if entry.dtype in _NUMPY_NAMES:
        return np.dtype(_NUMPY_NAMES[entry.dtype]), entry.shape
    if entry.dtype in _ML_DTYPES_NAMES:
        import ml_dtypes  # only where such a tensor is read: it is not NumPy's own

        return np.dtype(getattr(ml_dtypes, _ML_DTYPES_NAMES[entry.dtype])), entry.shape
    *rows, last = entry.shape  # at least one: 4 or 6 bits alone are not a whole byte
    row_bits = last * _BITS[entry.dtype]
    return np.dtype(np.uint8), (*rows, row_bits // 8) if row_bits % 8 == 0 else (entry.size_bytes,)


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
