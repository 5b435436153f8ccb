"""Columns of numbers in a page: codes of 1, 2 or 4 bytes, deflated, in base64.

A browser inflates them itself (`DecompressionStream`). The largest code of a width is a missing value: -1 of an
integer, a number that is not finite of a real.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Column:
    """A column as codes.

    Fields:
        name: of the column.
        trace: index of its trace; None if it is of all.
        codes: unsigned [n].
        low, high, power: a real is low + (high - low) (code / (largest code - 1))^power; None for integers.
    """

    name: str
    trace: int | None
    codes: NDArray[Any]
    low: float | None = None
    high: float | None = None
    power: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return its description for the page."""
        described = {"name": self.name, "trace": self.trace, "bytes": self.codes.itemsize, "size": self.codes.size}
        return described | {"low": self.low, "high": self.high, "power": self.power}


def integers(name: str, values: NDArray[Any], trace: int | None = None) -> Column:
    """Return a column of integers >= -1, in the smallest width that has them."""
    largest = int(values.max(initial=0))
    dtype = next(dtype for dtype in (np.uint8, np.uint16, np.uint32) if largest < np.iinfo(dtype).max)
    return Column(name, trace, np.where(values < 0, np.iinfo(dtype).max, values).astype(dtype).ravel())


def reals(name: str, values: NDArray[Any], trace: int, *, bits: int, power: int) -> Column:
    """Return a column of numbers in 8 or 16 bits, finer near the lowest: 0, or the least if that is negative."""
    dtype = np.uint8 if bits == 8 else np.uint16
    missing = np.iinfo(dtype).max
    values = values.astype(np.float64).ravel()
    finite = np.isfinite(values)
    low = float(min(values[finite].min(initial=0), 0))
    high = float(values[finite].max(initial=low))
    share = np.where(finite, values - low, 0) / ((high - low) or 1)
    codes = np.where(finite, np.rint(share ** (1 / power) * (missing - 1)), missing)
    return Column(name, trace, codes.astype(dtype), low, high, power)


def packed(header: dict[str, Any], columns: Sequence[Column]) -> str:
    """Return base64 of the deflated length of the header (4 bytes, little-endian), the header as JSON, the columns.

    The bytes of a column are in planes: all low bytes first. They compress better, and need no alignment.
    """
    described = header | {"columns": [column.to_json() for column in columns]}
    text = json.dumps(described, ensure_ascii=True, allow_nan=False).encode("ascii")
    planes = [
        np.ascontiguousarray(column.codes.view(np.uint8).reshape(-1, column.codes.itemsize).T) for column in columns
    ]
    whole = b"".join([len(text).to_bytes(4, "little"), text, *(plane.tobytes() for plane in planes)])
    return base64.b64encode(zlib.compress(whole)).decode("ascii")
