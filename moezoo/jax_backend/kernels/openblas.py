"""Grouped products in float32 by SciPy's OpenBLAS, called by XLA on the CPU.

JAX depends on SciPy, whose wheels for Linux contain OpenBLAS. XLA's interface for foreign functions is in C, and
ctypes makes its handlers of Python functions, so nothing is compiled. A handler calls OpenBLAS once or twice for each
expert, without the interpreter's lock, and shares the work with XLA's threads.
"""

import atexit
import ctypes
import importlib.util
import os
import platform
import re
from collections.abc import Callable
from ctypes import c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache, partial
from itertools import accumulate, count, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp

from moezoo.jax_backend.runtime import in_flight

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # cblas.h
_BYTES = 4  # of a float32
_INTERFACE = ("0", "3")  # major and minor version of the structures below
_UNPACKING_CORES = ("SkylakeX", "Cooperlake", "SapphireRapids")  # with kernels that do not pack small matrices


def grouped_rows(size_E: jax.Array, x_RD: jax.Array, w_EDF: jax.Array) -> jax.Array:
    """Return each row times its expert's matrix: [R, F]. Rows beyond the sum of `size_E` are 0."""
    return _call("moezoo_grouped_rows", (x_RD.shape[0], w_EDF.shape[2]), size_E, x_RD, w_EDF)


def grouped_rows_transposed(size_E: jax.Array, *pairs: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return the sum over pairs (g_RF, w_EDF) of each row times its expert's transposed matrix: [R, D]."""
    shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])
    return _call("moezoo_grouped_rows_transposed", shape, size_E, *(array for pair in pairs for array in pair))


def grouped_gradients(size_E: jax.Array, x_RD: jax.Array, gradient_RF: jax.Array) -> jax.Array:
    """Return each expert's sum over its rows of x times gradient: [E, D, F]; 0 for experts without rows."""
    shape = (size_E.shape[0], x_RD.shape[1], gradient_RF.shape[1])
    return _call("moezoo_grouped_gradients", shape, size_E, x_RD, gradient_RF)


def _call(target: str, shape: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
    load()
    found: jax.Array = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32))(*arrays)
    return found


@cache
def load() -> str | None:
    """Load SciPy's OpenBLAS and register the products with XLA. Return its description, or None if it is not there.

    SciPy's own linear algebra in this process then uses one thread: those of OpenBLAS and XLA would share the cores
    badly. NumPy has another copy.
    """
    found = importlib.util.find_spec("scipy")
    if platform.system() != "Linux" or platform.machine() != "x86_64" or found is None or found.origin is None:
        return None
    if _interface() != _INTERFACE:
        return None
    files = [*Path(found.origin).parents[1].glob("scipy.libs/libscipy_openblas-*.so")]
    if not files:
        return None
    library: Any = ctypes.CDLL(str(files[0]))
    library.scipy_openblas_set_num_threads(1)
    library.scipy_cblas_sgemm.argtypes = [
        *[c_int] * 6,
        *[c_float, c_void_p, c_int, c_void_p, c_int],
        *[c_float, c_void_p, c_int],
    ]
    library.scipy_cblas_sgemm.restype = None
    for describe in (library.scipy_openblas_get_config, library.scipy_openblas_get_corename):
        describe.restype = ctypes.c_char_p
    unpacked = library.scipy_openblas_get_corename().decode() in _UNPACKING_CORES
    for target, parts in (
        ("moezoo_grouped_rows", partial(_parts_of_rows, library.scipy_cblas_sgemm, unpacked=unpacked)),
        ("moezoo_grouped_rows_transposed", partial(_parts_of_rows, library.scipy_cblas_sgemm, transposed=True)),
        ("moezoo_grouped_gradients", partial(_parts_of_gradients, library.scipy_cblas_sgemm)),
    ):
        _handlers[target] = _Handler(partial(_handle, parts))
        address = ctypes.cast(_handlers[target], c_void_p).value
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(address), platform="cpu")
    # Trap: at exit JAX destroys XLA's client while it holds the interpreter's lock, and the client waits for handlers,
    # which need that lock. Functions registered later run earlier.
    atexit.register(in_flight.wait)
    return " ".join(library.scipy_openblas_get_config().decode().split()[:2])


def _interface() -> tuple[str, ...]:
    """Return the version of the interface for foreign functions, as the header says that is installed with JAX."""
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    text = header.read_text(encoding="utf-8") if header.is_file() else ""
    return tuple(re.findall(r"^#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)$", text, re.MULTILINE))


# --- the products ----------------------------------------------------------------------------------------------------


Part = Callable[[], None]


def _parts_of_rows(
    gemm: Any, frame: "_CallFrame", threads: int, *, transposed: bool = False, unpacked: bool = False
) -> list[Part]:
    """Return the parts of a product for so many threads. Each computes as many rows of the result.

    `unpacked`: this processor's OpenBLAS multiplies few rows without copying the matrix.
    """
    sizes, *operands = frame.arguments.buffers()
    (result,) = frame.results.buffers()
    starts, (num_rows, width) = _starts(sizes), result.shape
    used = starts[-1]
    ctypes.memset(result.data + _BYTES * width * used, 0, _BYTES * width * (num_rows - used))
    pairs = [(x.data, x.shape[1], w.data) for x, w in zip(operands[::2], operands[1::2], strict=True)]
    out = result.data

    def part(first: int, end: int) -> None:
        for expert, (start, stop) in enumerate(pairwise(starts)):
            begin, until = max(first, start), min(end, stop)
            for index, (x, inner, w) in enumerate(pairs if begin < until else ()):
                step = _rows_at_once(until - begin, inner * width) if unpacked else until - begin
                for row in range(begin, until, step):
                    gemm(
                        *(_ROW_MAJOR, _PLAIN, _TRANSPOSED if transposed else _PLAIN),
                        *(min(step, until - row), width, inner, 1.0),
                        *(x + _BYTES * inner * row, inner),
                        *(w + _BYTES * inner * width * expert, inner if transposed else width),
                        *(min(index, 1), out + _BYTES * width * row, width),
                    )

    return [partial(part, *bounds) for bounds in _equal_shares(used, threads)]


def _parts_of_gradients(gemm: Any, frame: "_CallFrame", threads: int) -> list[Part]:
    """Return the parts of the gradients. Each sums over as many rows; an expert in two parts is divided by features."""
    sizes, x, gradient = frame.arguments.buffers()
    (result,) = frame.results.buffers()
    starts, (_, depth, width) = _starts(sizes), result.shape
    x_data, gradient_data, out = x.data, gradient.data, result.data

    def part(first: int, end: int) -> None:
        for expert, (start, stop) in enumerate(pairwise(starts)):
            begin, until = (_share(row - start, stop - start, depth) for row in (first, end))
            if begin < until:
                gemm(
                    *(_ROW_MAJOR, _TRANSPOSED, _PLAIN, until - begin, width, stop - start, 1.0),
                    *(x_data + _BYTES * (depth * start + begin), depth),
                    *(gradient_data + _BYTES * width * start, width),
                    *(0.0, out + _BYTES * width * (depth * expert + begin), width),
                )

    for expert, (start, stop) in enumerate(pairwise(starts)):
        if start == stop:
            ctypes.memset(out + _BYTES * depth * width * expert, 0, _BYTES * depth * width)
    return [partial(part, *bounds) for bounds in _equal_shares(starts[-1], threads)]


def _starts(sizes: "_Buffer") -> list[int]:
    """Return the first row of each expert, and the number of used rows."""
    return [0, *accumulate((c_int32 * sizes.dims[0]).from_address(sizes.data))]


def _rows_at_once(rows: int, matrix_size: int) -> int:
    """Return 8 where copying a matrix would cost more than the faster product saves, else all rows.

    OpenBLAS copies a matrix into its own layout for more than a million multiply-adds. 32 rows by 256 x 256 take 70 us
    in pieces of 8 rows, 104 at once; 128 rows 197 and 210.
    """
    return 8 if rows <= 128 and 8 * matrix_size <= 1_000_000 else rows


def _equal_shares(total: int, threads: int) -> list[tuple[int, int]]:
    """Return bounds of consecutive ranges, one for each thread."""
    return [(total * index // threads, total * (index + 1) // threads) for index in range(threads)]


def _share(row: int, rows: int, depth: int) -> int:
    """Return the features of an expert that belong to its first rows, in whole cache lines."""
    return 0 if row <= 0 else depth if row >= rows else row * depth // rows // 16 * 16


# --- XLA's interface for foreign functions (xla/ffi/api/c_api.h) -----------------------------------------------------


class _Version(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("version", _Version))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", ctypes.POINTER(_Metadata)),
    )  # fmt: skip


_Task = ctypes.CFUNCTYPE(None, c_void_p)


class _Schedule(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", c_void_p), ("context", c_void_p), ("task", _Task), ("data", c_void_p),
    )  # fmt: skip


class _Error(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("extension", c_void_p), ("message", ctypes.c_char_p), ("code", c_int))


class _Api(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("extension", c_void_p),
        ("version", _Version),
        ("internal", c_void_p),
        ("error_create", ctypes.CFUNCTYPE(c_void_p, ctypes.POINTER(_Error))),
        ("others", c_void_p * 10),
        ("thread_pool_schedule", ctypes.CFUNCTYPE(c_void_p, ctypes.POINTER(_Schedule))),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", c_void_p), ("dtype", c_int), ("data", c_void_p), ("rank", c_int64),
        ("dims", ctypes.POINTER(c_int64)),
    )  # fmt: skip

    @property
    def shape(self) -> list[int]:
        found: list[int] = self.dims[: self.rank]
        return found


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", c_void_p), ("count", c_int64), ("types", c_void_p),
        ("pointers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )  # fmt: skip

    def buffers(self) -> list[_Buffer]:
        return [pointer.contents for pointer in self.pointers[: self.count]]


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t), ("extension", ctypes.POINTER(_MetadataExtension)), ("api", ctypes.POINTER(_Api)),
        ("context", c_void_p), ("stage", c_int), ("arguments", _Buffers), ("results", _Buffers),
    )  # fmt: skip


_Handler = ctypes.CFUNCTYPE(c_void_p, ctypes.POINTER(_CallFrame))
_handlers: dict[str, Any] = {}  # XLA holds their addresses


def _handle(parts_of: Callable[[_CallFrame, int], list[Part]], pointer: Any) -> int | None:
    """Run a call, and return XLA's error object or None; or, at registration, report the version of the interface."""
    frame = pointer.contents
    api = frame.api.contents
    if frame.extension:
        version = frame.extension.contents.metadata.contents.version
        version.major, version.minor = api.version.major, api.version.minor
        return None
    try:
        _run_on_threads(frame, parts_of(frame, len(os.sched_getaffinity(0))))
    except Exception as error:
        # An exception cannot pass through XLA. 13 is XLA's code of an internal error.
        message = f"{type(error).__name__}: {error}".encode()
        created: int = api.error_create(_Error(ctypes.sizeof(_Error), None, message, 13))
        return created
    return None


_shared: dict[int, Callable[[], None]] = {}
_keys = count(1)


def _run_on_threads(frame: _CallFrame, parts: list[Part]) -> None:
    """Run the parts on this thread and on those of XLA that are free. Each takes the next part that is left."""
    done: SimpleQueue[Exception | None] = SimpleQueue()
    left, key = [*reversed(parts)], next(_keys)

    def work() -> None:
        while True:
            try:
                part = left.pop()
            except IndexError:
                return
            try:
                part()
            except Exception as error:
                done.put(error)
            else:
                done.put(None)

    _shared[key] = work
    schedule = frame.api.contents.thread_pool_schedule
    for _ in parts[1:]:
        schedule(_Schedule(ctypes.sizeof(_Schedule), None, frame.context, _help, key))
    work()
    failed = [error for error in [done.get() for _ in parts] if error is not None]
    del _shared[key]
    if failed:
        raise failed[0]


def _work_on(key: int) -> None:
    """Work on the parts of a call, which may have ended before this thread was free."""
    work = _shared.get(key)
    if work is not None:
        work()


_help = _Task(_work_on)
