"""CPU time that other processes take while a slice is measured, from Linux's /proc."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

from moezoo.bench.machine import cores

DISTURBED = 0.05
"""Share of the cores used by others from which a slice is called disturbed."""

_PROC = Path("/proc")
_SHORTEST = 0.2  # seconds; the kernel counts CPU time in steps of 10 ms
_IDLE = (3, 4)  # columns of /proc/stat: idle, and waiting for a disk
_GUEST = 8  # columns from here are counted in earlier ones too


@contextlib.contextmanager
def foreign_load(pids: Sequence[int], found: list[float]) -> Iterator[None]:
    """Append the mean share of the usable cores that processes other than these and this one use in the block.

    Time that a hypervisor takes away counts as theirs. Nothing is appended for a short block, one that raises, and on
    systems without /proc/stat.
    """
    own = [os.getpid(), *pids]
    begin, busy, used = perf_counter(), _busy_seconds(), _used_seconds(own)
    yield
    seconds = perf_counter() - begin
    if busy is not None and seconds >= _SHORTEST:
        others = ((_busy_seconds() or 0.0) - busy) - (_used_seconds(own) - used)
        found.append(min(1.0, max(0.0, others / (seconds * cores()))))


def _busy_seconds() -> float | None:
    """Return the seconds that the cores that this process may use were not idle since the machine started."""
    file = _PROC / "stat"
    if not file.is_file():
        return None
    usable = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    busy = 0
    for line in file.read_text().splitlines():
        name, *columns = line.split()
        if name in usable:
            busy += sum(int(ticks) for place, ticks in enumerate(columns[:_GUEST]) if place not in _IDLE)
    return busy / os.sysconf("SC_CLK_TCK")


def _used_seconds(pids: Sequence[int]) -> float:
    """Return the CPU seconds of processes and of the children for which they have waited."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, and its parent counts it
            after_name = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, after_name[11:15]))  # utime, stime, and both of waited-for children
    return ticks / os.sysconf("SC_CLK_TCK")
