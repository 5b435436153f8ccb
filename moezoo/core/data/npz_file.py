"""Strict reader of one array of integers in a `.npz` file: sizes are checked before anything is allocated."""

import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moezoo.core.data.npy_header import read_npy_header
from moezoo.core.errors import DataError
from moezoo.core.files import open_regular

ZIP_ERRORS = (EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error, struct.error)
_MAX_EXPANSION = 200  # a batch of one repeated token compresses to 1/1000
_MIN_EXPANDED_BYTES = 1 << 26


def npz_keys(path: Path) -> tuple[str, ...]:
    """Return the names of the arrays of a file. Raises OSError or one of ZIP_ERRORS."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        return tuple(_members(archive))


def load_npz(path: Path, key: str | None, name: str) -> npt.NDArray[np.integer[Any]]:
    """Return an array of a file, by its key; None: the only one. `name` names the file in errors.

    Raises DataError: no such array, or one that expands suspiciously. Raises OSError, ValueError (in a few words) or
    one of ZIP_ERRORS: a damaged file, or an array that is not of integers.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        members = _members(archive)
        chosen = next(iter(members)) if key is None and len(members) == 1 else key
        if chosen is None or chosen not in members:
            names = ", ".join(members)
            raise DataError(f"{name} has the arrays {names:.200}; got key {key!r:.80}. Set key to one of them.")
        info = members[chosen]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise ValueError(f"{chosen!r:.80} is encrypted or compressed in an unknown way")
        if info.file_size > max(_MIN_EXPANDED_BYTES, _MAX_EXPANSION * info.compress_size):
            raise DataError(
                f"{name} expands from {info.compress_size} to {info.file_size} bytes; expected token ids, which "
                f"compress to no less than 1/{_MAX_EXPANSION}. Write it again, as .npy if it is what you want."
            )
        with archive.open(info) as member:  # reads at most file_size bytes
            header = read_npy_header(member, info.file_size)
            content = member.read(header.size_bytes)
        if len(content) != header.size_bytes:
            raise ValueError(f"{chosen!r:.80} ends after {len(content)} bytes; expected {header.size_bytes}")
        order: Literal["C", "F"] = "F" if header.fortran_order else "C"
        return np.frombuffer(content, header.dtype).reshape(header.shape, order=order)


def _members(archive: zipfile.ZipFile) -> Mapping[str, zipfile.ZipInfo]:
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
