"""Replacements for operations that are slow in MLX's Linux wheel for x86, each with a custom gradient.

In that wheel an elementwise operation runs on one core; `exp` and all operations based on it (sigmoid, softmax,
logsumexp, fused attention) take 12 to 20 ns per element, `where` 6, and `power`, from the C library, 5; a sum or a
product takes 0.4. NumPy's `exp` takes 0.5, and a sum or a product of blocks that stay in a cache 0.1. So from some size
on, NumPy computes on all cores (`runtime/cores.py`): MLX then waits for the inputs, and nothing stays lazy. Smaller
arrays, as in decoding, stay MLX's. On other platforms (Apple silicon, for instance) this folder is not used.
"""

import functools
import platform

import mlx.core as mx

from moezoo.mlx_backend.runtime.cores import can_limit_blas, cores

SMALL = 2**14
"""Number of elements up to which waiting for them costs more than a kernel saves."""


@functools.cache
def is_x86_cpu() -> bool:
    """Return True on the platform that these kernels are for: an x86 CPU."""
    return mx.default_device() == mx.Device(mx.cpu) and platform.machine().lower() in ("x86_64", "amd64")


def kernels() -> str:
    """Return what computes experts, attention, norms and losses, for the run's header."""
    if not is_x86_cpu():
        return "MLX's own"
    where = f"{cores()} cores" if can_limit_blas() else "one core (NumPy's BLAS is not its wheel's)"
    return f"NumPy on {where}; few rows: MLX's own"


def pays(size: int) -> bool:
    """Return True if a kernel is worth its wait for an array of that many elements."""
    return is_x86_cpu() and size >= SMALL
