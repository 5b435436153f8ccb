"""Arrays of integers and JSON as engines send them: base64, `.npy`, `.npz`, nested lists, and JSON lines."""

import base64
import binascii
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.data.npy_header import read_npy_header
from moezoo.core.data.npz_file import ZIP_ERRORS, load_npz, npz_keys
from moezoo.core.data.token_shards import IdFile, open_npy
from moezoo.core.errors import DataError
from moezoo.core.files import open_regular, reason_of
from moezoo.core.json_text import parse_json
from moezoo.core.traces.formats.foreign import IntegerArray

_MAX_JSON_BYTES = 1 << 30
_MAX_LINE_BYTES = 1 << 28
_BLOCK_INTEGERS = 1 << 22


def damaged(where: str, error: BaseException | str, expected: str) -> DataError:
    """Return the error about a file that cannot be read."""
    got = error if isinstance(error, str) else reason_of(error)
    return DataError(f"{where} cannot be read; got: {got}; expected {expected}. Record it again.")


def json_records(path: Path, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each JSON object of a file with its place: the only one, those of a list, or one a line.

    Raises DataError: damaged, or not objects. `.jsonl` is read line by line, anything else as a whole.
    """
    if path.suffix == ".jsonl":
        yield from _json_lines(path, expected)
        return
    try:
        with open_regular(path, _MAX_JSON_BYTES) as file:
            value = parse_json(file.readall())
    except (OSError, ValueError) as error:
        raise damaged(str(path), error, expected) from None
    several = value if isinstance(value, list) else [value]
    for number, record in enumerate(several):
        place = f"response {number}" if isinstance(value, list) else ""
        yield place, _object(record, f"{place or 'the content'} of {path}", expected)


def _json_lines(path: Path, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open_regular(path) as raw, io.BufferedReader(raw, 1 << 20) as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                place = f"line {number}"
                if len(line) > _MAX_LINE_BYTES:
                    raise damaged(f"{place} of {path}", f"more than {_MAX_LINE_BYTES} bytes", expected)
                if line.strip():
                    try:
                        record = parse_json(line)
                    except ValueError as error:
                        raise damaged(f"{place} of {path}", error, expected) from None
                    yield place, _object(record, f"{place} of {path}", expected)
    except OSError as error:
        raise damaged(str(path), error, expected) from None


def _object(record: Any, where: str, expected: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise damaged(where, f"a {type(record).__name__}", expected)
    return record


def member(record: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the object inside objects; empty if one of them is not there."""
    for name in names:
        inner = record.get(name)
        record = inner if isinstance(inner, dict) else {}
    return record


def array_of(value: Any, where: str, axes: int) -> IntegerArray:
    """Return nested lists, or base64 of a `.npy` file, as an array of integers with a number of axes.

    Raises DataError: ragged, other numbers, or not base64.
    """
    expected = f"integers with {axes} axes, as nested lists or as base64 of a .npy file"
    try:
        if isinstance(value, str):
            content = base64.b64decode(value, validate=True)
            file = io.BytesIO(content)
            header = read_npy_header(file, len(content))
            order: Any = "F" if header.fortran_order else "C"
            flat = np.frombuffer(content, header.dtype, offset=header.start_byte, count=-1)
            array = flat[: int(np.prod(header.shape))].reshape(header.shape, order=order)
        else:
            array = np.asarray(value if isinstance(value, list) else None)
    except (ValueError, OverflowError, binascii.Error) as error:
        raise damaged(where, error, expected) from None
    if array.dtype.kind not in "iu" or array.ndim != axes or 0 in array.shape[1:]:
        raise damaged(where, f"{array.dtype} {list(array.shape)}", expected)
    return array


def flat_int32(value: Any, where: str) -> NDArray[np.int32]:
    """Return base64 of int32 as an array. Raises DataError: not base64, or not whole integers."""
    expected = "base64 of int32"
    try:
        if not isinstance(value, str):
            raise ValueError(f"a {type(value).__name__}")
        content = base64.b64decode(value, validate=True)
        if len(content) % 4:
            raise ValueError(f"{len(content)} bytes, which are not whole int32")
    except (ValueError, binascii.Error) as error:
        raise damaged(where, error, expected) from None
    return np.frombuffer(content, "<i4")


def open_array(path: Path, key: str | None = None) -> IdFile | IntegerArray:
    """Open an array of integers in a `.npy` file, or read one of a `.npz` file by its key. Raises DataError."""
    try:
        return open_npy(path, str(path)) if path.suffix == ".npy" else load_npz(path, key, str(path))
    except (OSError, ValueError, *ZIP_ERRORS) as error:
        raise damaged(str(path), error, "integers written by numpy.save or numpy.savez") from None


def array_keys(path: Path) -> tuple[str, ...]:
    """Return the names of the arrays of a `.npz` file. Raises DataError."""
    try:
        return npz_keys(path)
    except (OSError, ValueError, *ZIP_ERRORS) as error:
        raise damaged(str(path), error, "a file written by numpy.savez") from None


def blocks(array: IdFile | IntegerArray) -> Iterator[IntegerArray]:
    """Yield parts of an array along its first axis, whatever its size. Raises DataError: the file was changed."""
    row = int(np.prod(array.shape[1:]))
    step = max(1, _BLOCK_INTEGERS // max(1, row))
    if not isinstance(array, IdFile):
        yield from (array[first : first + step] for first in range(0, len(array), step))
        return
    with array.opened() as read:
        for first in range(0, len(array), step):
            count = min(step, len(array) - first)
            yield read(first * row, count * row).reshape(count, *array.shape[1:])


def base64_npy(array: NDArray[Any]) -> str:
    """Return base64 of an array as a `.npy` file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


def base64_int32(array: NDArray[Any]) -> str:
    """Return base64 of an array's elements as int32."""
    return base64.b64encode(np.ascontiguousarray(array, "<i4").tobytes()).decode("ascii")


def json_line(record: dict[str, Any]) -> bytes:
    """Return a JSON object as one line."""
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
