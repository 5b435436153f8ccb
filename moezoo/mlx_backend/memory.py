"""How the C library gives memory to MLX on Linux.

MLX's CPU allocator is plain `malloc`. The GNU C library gets each large array from the kernel and returns it at once,
so every operation of a training step faults in the pages of its result anew: a third of the time of the experts at the
sizes of `writings/performance.md`. With larger thresholds freed memory stays in the process and is used again.
"""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> str:
    """Ask malloc to keep what is freed; returns what the header says about it."""
    if platform.libc_ver()[0] != "glibc":
        return "as the system's malloc does"
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(_M_MMAP_THRESHOLD, _MOST) and mallopt(_M_TRIM_THRESHOLD, _MOST):
        return "freed memory is kept (mallopt)"
    return "freed memory goes back (mallopt refused)"


MEMORY = keep_freed_memory()
