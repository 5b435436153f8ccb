"""glibc malloc settings that keep freed memory in the process for the next training step.

By default the GNU C library maps each large array from the kernel and unmaps it when it is freed. A training step on
the CPU then page-faults all its memory again, which is a quarter of its time (writings/performance.md). The allocators
of other systems keep freed memory.
"""

import ctypes
import functools
import platform

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


@functools.cache
def keep_freed_memory(*, of_all_threads: bool = True) -> str:
    """Configure this process's malloc to keep freed memory; return a description for the run's header.

    `mmap` is off, and the main thread's arena never shrinks. Arenas of other threads are limited in size, and fall back
    to `mmap` for large arrays. `of_all_threads`: all that start later use the main one. It is then slower if a
    compiler's threads leave many small pieces there.
    """
    if platform.libc_ver()[0] != "glibc":
        return "default of the system's malloc"
    mallopt = ctypes.CDLL(None).mallopt
    # Trap: thresholds are an int here, and -1 becomes the largest size; 2**31 - 1 would return a step's 2 GiB.
    accepted = [mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)]
    if of_all_threads:
        accepted.append(mallopt(_M_ARENA_MAX, 1))
    if not all(accepted):
        return "returned to the system (mallopt failed)"
    return "kept in the process (mallopt)" if of_all_threads else "kept in the main thread (mallopt)"


def return_freed_memory() -> None:
    """Return the memory that is free now to the system; what is freed later is kept as before."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
