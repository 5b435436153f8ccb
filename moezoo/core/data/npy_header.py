"""Strict reader of `.npy` headers: what it says is checked against the size of the file before anything is allocated.

Source: NumPy's format, https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
Differs: only integers; numpy.load evaluates any header, and allocates whatever shape it claims.
"""

import ast
import math
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

_MAX_BYTES = 10_000  # of a header; numpy.load has the same limit
_MAX_AXES = 8


@dataclass(frozen=True)
class NpyHeader:
    """An array of integers in a file: dtype, shape, order of the axes, and position of its first byte."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    start_byte: int

    @property
    def size_bytes(self) -> int:
        """Number of bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(file: IO[bytes], file_bytes: int) -> NpyHeader:
    """Read the header at the beginning of a file of `file_bytes` bytes.

    Raises ValueError in a few words: not a `.npy` file, not integers, or a shape that does not fit into the file.
    """
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError("it does not begin like a .npy file")
    length_bytes = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(length_bytes), "little")
    if length > _MAX_BYTES:
        raise ValueError(f"its header has {length} bytes; expected at most {_MAX_BYTES}")
    text = file.read(length)
    if len(text) != length:
        raise ValueError("it ends inside its header")
    dtype, shape, fortran_order = _parse(text)
    header = NpyHeader(dtype, shape, fortran_order, 8 + length_bytes + length)
    if header.start_byte + header.size_bytes > file_bytes:
        present = file_bytes - header.start_byte
        raise ValueError(f"its header has the shape {list(shape)} of {dtype}, but {present} bytes follow")
    return header


def _parse(text: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    try:
        fields = ast.literal_eval(text.decode("utf-8"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # each is possible for other text
        raise ValueError("its header is not a Python dictionary") from None
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header is not {descr, fortran_order, shape}")
    descr, fortran_order, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if not isinstance(descr, str) or descr[:1] not in "<>|=" or descr[1:] not in _INTEGERS:
        raise ValueError(f"its elements are {descr!r:.60}, not integers")
    if not isinstance(shape, tuple) or len(shape) > _MAX_AXES or not all(_is_size(size) for size in shape):
        raise ValueError(f"its shape is {shape!r:.60}, not a tuple of sizes")
    if type(fortran_order) is not bool:
        raise ValueError(f"its fortran_order is {fortran_order!r:.60}, not True or False")
    return np.dtype(descr), shape, fortran_order


_INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size < 1 << 48
