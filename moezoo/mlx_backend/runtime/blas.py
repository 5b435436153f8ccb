"""Load a fast BLAS (OpenBLAS) for MLX on Linux.

MLX's Linux wheel bundles the reference BLAS, whose float32 products are some forty times slower than OpenBLAS's. Global
symbols loaded before MLX take precedence, so this module must be imported before `mlx.core`; the package's `__init__`
does that for every module of this backend. On macOS, or if no OpenBLAS is found, it does nothing; the run's header
reports which BLAS is in use.
"""

import ctypes
import fnmatch
import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path


def load_fast_blas() -> str:
    """Load OpenBLAS for libraries loaded later, and return its description for the run's header."""
    if platform.system() != "Linux":
        return "Accelerate" if platform.system() == "Darwin" else "MLX's own"
    if "mlx.core" in sys.modules:
        return "reference (slow): mlx.core was imported before moezoo"
    # By default, an idle OpenBLAS thread spins for tens of ms, on a core that MLX's threads need.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    for load in (_system_openblas, _packaged_openblas):
        try:
            return load()
        except (OSError, importlib.metadata.PackageNotFoundError):
            continue
    return "reference (slow): install libopenblas0-pthread, or pip install cmeel-openblas"


def _system_openblas() -> str:
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    return "OpenBLAS (system)"


def _packaged_openblas() -> str:
    """Load OpenBLAS of the PyPI package cmeel-openblas, which needs libgfortran.so.5 on the system."""
    library = file_of("cmeel-openblas", "libopenblas.so.0")
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        _load_bundled_gfortran()
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return f"OpenBLAS {importlib.metadata.version('cmeel-openblas')} (cmeel-openblas)"


def _load_bundled_gfortran() -> None:
    """Load the libgfortran that MLX's wheel bundles, under the name that OpenBLAS requires.

    Wheels rename bundled libraries (`libgfortran-f7379c93.so.5.0.0`), and the loader matches libraries by that name
    (SONAME). A copy with the original, shorter SONAME in its place is loaded instead.
    """
    ctypes.CDLL(str(file_of("mlx-cpu", "libquadmath-*")))
    fortran = file_of("mlx-cpu", "libgfortran-*")
    name, plain = fortran.name.encode() + b"\0", b"libgfortran.so.5"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / plain.decode()
        copy.write_bytes(fortran.read_bytes().replace(name, plain.ljust(len(name), b"\0")))
        ctypes.CDLL(str(copy))


def file_of(distribution: str, pattern: str) -> Path:
    """Return the first file of an installed distribution whose name matches. Raises FileNotFoundError."""
    for file in importlib.metadata.files(distribution) or []:
        if fnmatch.fnmatch(file.name, pattern):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{distribution} has no {pattern}")


BLAS = load_fast_blas()
