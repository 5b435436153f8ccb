"""Memory that is freed and asked for again by every step, kept in the process.

The GNU C library takes each large array from the kernel and gives it back when it is freed. A training step on the CPU
then faults in all its pages anew, which is a quarter of its time (writings/performance.md). Other systems' allocators
keep freed memory by themselves.
"""

import ctypes
import functools
import platform

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


@functools.cache
def keep_freed_memory() -> str:
    """Tell this process's malloc to keep what is freed; returns what a run's header says about it.

    Nothing is taken by `mmap`, the heap does not shrink, and there is one arena: those of other threads are bounded and
    would pass large arrays on to `mmap`. Threads that are there already keep theirs, so call it early.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as the system's malloc does"
    mallopt = ctypes.CDLL(None).mallopt
    # Trap: thresholds are an int here, and -1 becomes the largest size; 2**31 - 1 would give a step's 2 GiB back.
    taken = [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_ARENA_MAX, 1)]
    return "kept in the process (mallopt)" if all(taken) else "given back (mallopt refused)"
