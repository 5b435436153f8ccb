"""Memory that this process can still get: of the machine, its container or job (cgroup), and its own limits."""

import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Available:
    """Memory in bytes that this process can still get, and what limits it."""

    bytes: int
    limit: str


def available_memory(root: Path = Path("/")) -> Available | None:
    """Return the smallest of all limits of this process's memory; None on a system that tells none.

    Swap counts as memory, and so do files in the page cache, which the kernel drops on demand: memory beyond the result
    cannot be had. `root` holds `proc` and `sys`.
    """
    machine = _sizes(root / "proc/meminfo")
    found = [*_process_limits(_sizes(root / "proc/self/status"))]
    if "MemAvailable" in machine:
        swap = machine.get("SwapFree", 0)
        found.append(Available(machine["MemAvailable"] + swap, "free memory of this machine"))
        found += _cgroup_limits(root, swap)
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(Available(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory of this machine"))
    return min(found, key=lambda limit: limit.bytes, default=None)


def _process_limits(status: dict[str, int]) -> Iterator[Available]:
    for name, used, option in (("RLIMIT_AS", "VmSize", "ulimit -v"), ("RLIMIT_DATA", "VmData", "ulimit -d")):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and used in status:
            yield Available(max(0, limit - status[used]), f"left by {option}")


def _cgroup_limits(root: Path, swap: int) -> Iterator[Available]:
    """Yield the limit of each memory cgroup that this process is in, of version 1 and 2, up to the root.

    Trap: in a container without a cgroup namespace the path is that of the host, and only the root is mounted.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, most, used, files = root / "sys/fs/cgroup", "memory.max", "memory.current", "{}_file"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            most, used, files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}_file"
        else:
            continue
        folder = base / path.strip("/")
        for each in (folder, *folder.parents[: len(Path(path).parts) - 1]):
            limit, usage = _text(each / most).strip(), _text(each / used).strip()
            if limit.isdigit() and usage.isdigit():
                kept = dict(re.findall(r"^(\w+) ([0-9]+)$", _text(each / "memory.stat"), re.MULTILINE))
                cached = sum(int(kept.get(files.format(kind), 0)) for kind in ("active", "inactive"))
                left = max(0, int(limit) - int(usage) + cached) + swap
                yield Available(left, "left by the memory limit of this container or job (cgroup)")


def _sizes(path: Path) -> dict[str, int]:
    """Return the sizes of a file of lines such as `VmSize:  123 kB`, in bytes."""
    return {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+([0-9]+) kB$", _text(path), re.MULTILINE)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
