"""A fast BLAS under MLX on Linux.

MLX's Linux wheel brings the reference BLAS, whose float32 products run some forty times slower than OpenBLAS's. Symbols
that are loaded globally before MLX win, so this module must be imported before `mlx.core`; every module of this
backend that imports MLX gets that through the package's `__init__`. On macOS and where no OpenBLAS is found it does
nothing, and the run's header says which BLAS is in use.
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
    """Load OpenBLAS for all that is loaded later; returns what the header says about it."""
    if platform.system() != "Linux":
        return "Accelerate" if platform.system() == "Darwin" else "MLX's own"
    if "mlx.core" in sys.modules:
        return "reference (slow): mlx.core was imported before moezoo"
    # By default a thread spins for tens of ms while it waits for the next product, on a core that MLX's threads want.
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
    """OpenBLAS of the PyPI package cmeel-openblas, which expects the system to have libgfortran.so.5."""
    library = _file_of("cmeel-openblas", "libopenblas.so.0")
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        _load_fortran_of_mlx()
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return f"OpenBLAS {importlib.metadata.version('cmeel-openblas')} (cmeel-openblas)"


def _load_fortran_of_mlx() -> None:
    """Load the libgfortran that MLX's wheel brings, under the plain name that OpenBLAS asks for.

    Wheels rename the libraries that they bundle (`libgfortran-f7379c93.so.5.0.0`), and the loader matches needed
    libraries by that name (SONAME), which a copy with the shorter, plain name in its place restores.
    """
    ctypes.CDLL(str(_file_of("mlx-cpu", "libquadmath-*")))
    fortran = _file_of("mlx-cpu", "libgfortran-*")
    name, plain = fortran.name.encode() + b"\0", b"libgfortran.so.5"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / plain.decode()
        copy.write_bytes(fortran.read_bytes().replace(name, plain.ljust(len(name), b"\0")))
        ctypes.CDLL(str(copy))


def _file_of(distribution: str, pattern: str) -> Path:
    """The first file of an installed distribution whose name matches. Raises FileNotFoundError."""
    for file in importlib.metadata.files(distribution) or []:
        if fnmatch.fnmatch(file.name, pattern):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{distribution} has no {pattern}")


BLAS = load_fast_blas()
