"""Work in pieces on all cores, with NumPy: its exponentials use vector instructions, and a piece stays in a cache."""

import contextlib
import ctypes
import functools
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.runtime.blas import file_of

BLOCK = 2**15
"""Elements per block of elementwise work: several arrays of that size fit into the cache of a core."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@functools.cache
def cores() -> int:
    """Return how many pieces run at a time: the threads of NumPy's BLAS, or 1 where they cannot be limited."""
    blas = _numpy_blas()
    return 1 if blas is None else int(blas.scipy_openblas_get_num_threads64_())


def can_limit_blas() -> bool:
    """Return True if NumPy's BLAS is the one of its wheel; with another one, pieces run one after the other."""
    return _numpy_blas() is not None


def on_all_cores(pieces: Iterable[Callable[[], object]]) -> None:
    """Run the pieces and wait; whichever core is free takes the next. A product in a piece has one thread."""
    left = iter(list(pieces))  # all threads take from one iterator
    with one_blas_thread():
        helpers = [_helpers().submit(one_by_one, left) for _ in range(cores() - 1)]
        one_by_one(left)
        for helper in helpers:
            if not helper.cancel():  # one that has not started has nothing left to do
                helper.result()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Give each product of NumPy one thread. An idle thread of OpenBLAS may spin for 25 ms, on a core that is needed.

    With another BLAS than that of NumPy's wheel nothing changes.
    """
    blas = _numpy_blas()
    if blas is None:
        yield
        return
    cores()  # counted before the first limit
    count = blas.scipy_openblas_get_num_threads64_()
    blas.scipy_openblas_set_num_threads64_(1)
    try:
        yield
    finally:
        blas.scipy_openblas_set_num_threads64_(count)


def one_by_one(pieces: Iterable[Callable[[], object]]) -> None:
    """Run the pieces in order on this core; a product in one has all threads of NumPy's BLAS."""
    with np.errstate(all="ignore"):  # as in MLX, where 1 / (1 + exp(x)) may overflow on the way
        for piece in pieces:
            piece()


def values(*arrays: mx.array) -> list[Floats]:
    """Evaluate float32 arrays, and return views of their values."""
    mx.eval(arrays)
    return [np.asarray(array) for array in arrays]


def zeros(*shape: int) -> tuple[mx.array, Floats]:
    """Return an array of zeros, and a view through which it is written."""
    array = mx.zeros(shape)
    return array, values(array)[0]


def blocks(rows: int, width: int) -> list[slice]:
    """Return consecutive slices of rows that each have about BLOCK elements."""
    size = max(1, BLOCK // width)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores() - 1, "moezoo")


@functools.cache
def _numpy_blas() -> ctypes.CDLL | None:
    """Return the OpenBLAS that NumPy's wheel bundles, and that the process has therefore loaded."""
    try:
        return ctypes.CDLL(str(file_of("numpy", "libscipy_openblas64_*")))
    except (OSError, importlib.metadata.PackageNotFoundError):  # another build of NumPy
        return None
