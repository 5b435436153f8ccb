"""Check of the libraries that MLX compiles for the CPU, keeps in the temporary folder, and loads unread.

`mx.compile` on Linux writes `<temporary folder>/mlx/<version>/cpu/lib*.so` with g++, and every later process loads
them. A library that a killed compiler left incomplete is a bus error at each start, and MLX never compiles it again.
"""

import atexit
import contextlib
import functools
import json
import struct
import tempfile
import time
import warnings
from pathlib import Path

import mlx.core as mx

from moezoo.core.errors import RunError
from moezoo.core.files import sha256_of, write_atomically

_RECORD = "moezoo.json"  # SHA-256 of each library, by name
_IN_PROGRESS_S = 60.0  # a younger incomplete library may be one that another process compiles
_SETTLED_S = 5.0  # a younger one may not be written to its end


@functools.cache
def check_compiled_libraries() -> None:
    """Remove damaged libraries with a warning; MLX compiles them again. At exit, record the SHA-256 of those there are.

    A library that no earlier process recorded is only checked for its length.
    """
    folder = Path(tempfile.gettempdir()) / "mlx" / mx.__version__ / "cpu"  # type: ignore[attr-defined]
    recorded = _recorded(folder)
    with contextlib.suppress(OSError, RunError):  # another process may remove one, or own the folder
        for library in folder.glob("lib*.so"):
            incomplete = not _is_complete(library) and _age_s(library) > _IN_PROGRESS_S
            if incomplete or recorded.get(library.name) not in (None, sha256_of(library)):
                warnings.warn(f"a library compiled by MLX is damaged and is compiled again ({library})", stacklevel=2)
                library.unlink()
    atexit.register(_record, folder)


def _record(folder: Path) -> None:
    with contextlib.suppress(OSError, RunError):
        settled = [library for library in folder.glob("lib*.so") if _age_s(library) > _SETTLED_S]
        digests = {library.name: sha256_of(library) for library in settled if _is_complete(library)}
        if digests and digests != _recorded(folder):
            write_atomically(folder / _RECORD, json.dumps(digests, indent=1))


def _recorded(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / _RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _is_complete(library: Path) -> bool:
    """Return whether an ELF file reaches to the end of its section headers, which come last."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (offset,), (size, number) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(offset + size * number <= library.stat().st_size)
