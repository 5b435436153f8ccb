"""Parsing, strict validation and encoding of safetensors headers.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moezoo.core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_MAX_NAME = 1_000  # characters of a tensor's name
# Bits per element by the format's dtype name, from narrow to wide in the order of the format's list.
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

# The format's dtype names to those of NumPy and of ml_dtypes (a dependency of jax).
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
    """One tensor of a file: the format's dtype name (`F32`, `BF16`), shape, and position of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start_byte: int  # from the beginning of the file
    size_bytes: int


class HeaderProblem(Exception):
    """An invalid header; the message does not have the file's name."""


def parse_header(text: bytes) -> tuple[dict[str, TensorEntry], int]:
    """Return the tensors of a header by name, and the size of the file in bytes. Raises HeaderProblem."""
    header = _parse_json(text)
    header.pop("__metadata__", None)
    data_start = 8 + len(text)
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start_byte, item[1].size_bytes)):
        if entry.start_byte != position:
            what = "overlaps the tensor before it" if entry.start_byte < position else "leaves a hole before it"
            raise HeaderProblem(f"{name!r:.80} {what} (it starts at byte {entry.start_byte}; expected {position})")
        position += entry.size_bytes
    return entries, position


def _parse_json(text: bytes) -> dict[str, Any]:
    """Parse the header's JSON object; unlike Python's parser, refuse duplicate keys, NaN and other encodings."""
    if not text.startswith(b"{"):
        raise HeaderProblem("its header does not begin with '{'")

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise HeaderProblem(f"its header has the key {name!r:.80} twice")
            found[name] = value
        return found

    def refuse_constant(name: str) -> None:
        raise HeaderProblem(f"its header has {name}, which is not JSON")

    def natural_number(digits: str) -> int:
        if digits.startswith("-"):  # Trap: -0 would be parsed as 0, but other parsers refuse it
            raise HeaderProblem(f"its header has the negative number {digits:.80}")
        return int(digits)

    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
            parse_int=natural_number,
        )
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # Trap: json accepts a lone surrogate
    except (ValueError, RecursionError) as error:
        raise HeaderProblem(f"its header is not UTF-8 JSON ({type(error).__name__})") from None
    assert isinstance(header, dict)  # it begins with '{'
    metadata = header.get("__metadata__")
    if metadata is None:  # null is what mx.save_safetensors writes
        return header
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderProblem("its __metadata__ is not a map from text to text")
    return header


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    if len(name) > _MAX_NAME:
        raise HeaderProblem(f"its header has a name of {len(name)} characters, {name!r:.80}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderProblem(f"the entry of {name!r:.80} is not {{dtype, shape, data_offsets}}; got {value!r:.80}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise HeaderProblem(f"the dtype of {name!r:.80} is unknown; got {dtype!r:.80}")
    if not _are_sizes(shape):
        raise HeaderProblem(f"the shape of {name!r:.80} is not a list of sizes; got {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderProblem(f"the data_offsets of {name!r:.80} are not two positions; got {offsets!r:.80}")
    total_bits = _BITS[dtype]
    for size in shape:
        total_bits *= size
        if total_bits >= 1 << 64:  # Trap: [2**40, 2**40, 0] is empty, but overflows every loader
            raise HeaderProblem(f"the shape of {name!r:.80} is impossibly large; got {shape!r:.80}")
    if total_bits % 8:
        raise HeaderProblem(f"{name!r:.80} does not end on a whole byte: {total_bits} bits")
    start, end = offsets
    if end - start != total_bits // 8:
        raise HeaderProblem(
            f"{name!r:.80} is {dtype} {shape!s:.80} and needs {total_bits // 8} bytes, but has offsets {offsets}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + start, total_bits // 8)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header, without its length, of a file with these tensors (the format's dtype name, shape).

    The header is for `write_stream`. Tensors are sorted by decreasing dtype width, so that each is aligned, then by
    name, as safetensors sorts them.
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
    """Return the size of a tensor in a file."""
    return _BITS[dtype] * math.prod(shape) // 8


def format_dtype(name: str, dtype: np.dtype[Any]) -> str:
    """Return the format's name (`F32`, `BF16`) of a tensor's dtype. Raises CheckpointError if it has none."""
    if name == "__metadata__":
        raise CheckpointError("a tensor cannot be named __metadata__: the format reserves that name. Rename it.")
    if dtype.name not in _FORMAT_NAMES:
        known = ", ".join(_FORMAT_NAMES)
        raise CheckpointError(f"{name} has dtype {dtype}, which safetensors does not support; expected one of {known}.")
    return _FORMAT_NAMES[dtype.name]


def numpy_form(entry: TensorEntry) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the NumPy dtype and shape of a tensor; packed F4 and F6 elements are bytes."""
    if entry.dtype in _NUMPY_NAMES:
        return np.dtype(_NUMPY_NAMES[entry.dtype]), entry.shape
    if entry.dtype in _ML_DTYPES_NAMES:
        import ml_dtypes  # imported only if needed: it is not part of NumPy

        return np.dtype(getattr(ml_dtypes, _ML_DTYPES_NAMES[entry.dtype])), entry.shape
    *rows, last = entry.shape  # at least one: 4 or 6 bits alone are not a whole byte
    row_bits = last * _BITS[entry.dtype]
    return np.dtype(np.uint8), (*rows, row_bits // 8) if row_bits % 8 == 0 else (entry.size_bytes,)
