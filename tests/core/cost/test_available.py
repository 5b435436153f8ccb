"""Free memory: the smallest of what the machine, its cgroups and the limits of the process leave."""

import resource
from pathlib import Path

import pytest

from moezoo.core.cost.available import available_memory

KIB = 1024


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def system(tmp_path):
    """A system with 900 kB free memory and 100 kB free swap, outside of any cgroup."""
    write(tmp_path, "proc/meminfo", "MemTotal:  2000 kB\nMemAvailable:   900 kB\nSwapFree:  100 kB\n")
    write(tmp_path, "proc/self/status", "Name:\tpython\nVmSize:\t  300 kB\nVmData:\t  200 kB\n")
    return tmp_path


def write(root: Path, path: str, text: object) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(str(text), encoding="utf-8")


def left(root: Path) -> tuple[int, str]:
    found = available_memory(root)
    assert found is not None
    return found.bytes, found.limit


def test_machine_without_limits(system):
    assert left(system) == (1000 * KIB, "free memory of this machine")


@pytest.mark.parametrize(("limit", "kib"), [("RLIMIT_AS", 500 - 300), ("RLIMIT_DATA", 500 - 200)])
def test_limit_of_the_process(system, monkeypatch, limit, kib):
    limits = {getattr(resource, limit): (500 * KIB, resource.RLIM_INFINITY)}
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, unlimited))
    size, what = left(system)
    assert size == kib * KIB
    assert what.startswith("left by ulimit -")


@pytest.mark.parametrize("limited", ["job", ""], ids=["own cgroup", "parent"])
def test_cgroup_of_version_2(system, limited):
    """The limit of a cgroup holds for those below it; files in the page cache can be dropped."""
    write(system, "proc/self/cgroup", "0::/job/step\n")
    for folder in ("job/step", "job", ""):
        write(system, f"sys/fs/cgroup/{folder}/memory.max", 700 * KIB if folder == limited else "max")
        write(system, f"sys/fs/cgroup/{folder}/memory.current", 600 * KIB)
        write(system, f"sys/fs/cgroup/{folder}/memory.stat", f"anon 1\nactive_file {50 * KIB}\ninactive_file {KIB}\n")
    assert left(system) == (
        (700 - 600 + 51 + 100) * KIB,
        "left by the memory limit of this container or job (cgroup)",
    )


@pytest.mark.parametrize("mounted", ["docker/1a2b", ""], ids=["on the host", "in a container"])
def test_cgroup_of_version_1(system, mounted):
    write(system, "proc/self/cgroup", "5:cpu,cpuacct:/docker/1a2b\n4:memory:/docker/1a2b\n0::/\n")
    write(system, f"sys/fs/cgroup/memory/{mounted}/memory.limit_in_bytes", 300 * KIB)
    write(system, f"sys/fs/cgroup/memory/{mounted}/memory.usage_in_bytes", 290 * KIB)
    write(system, f"sys/fs/cgroup/memory/{mounted}/memory.stat", f"odd\ntotal_inactive_file {4 * KIB}\n")
    assert left(system)[0] == (300 - 290 + 4 + 100) * KIB


def test_unlimited_cgroup_leaves_the_memory_of_the_machine(system):
    write(system, "proc/self/cgroup", "4:memory:/\n")
    write(system, "sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    write(system, "sys/fs/cgroup/memory/memory.usage_in_bytes", 10)
    assert left(system)[1] == "free memory of this machine"


def test_more_than_is_free_counts_as_none(system):
    write(system, "proc/self/cgroup", "0::/\n")
    write(system, "sys/fs/cgroup/memory.max", KIB)
    write(system, "sys/fs/cgroup/memory.current", 500 * KIB)
    assert left(system)[0] == 100 * KIB


def test_system_without_proc_counts_all_memory(tmp_path):
    assert left(tmp_path)[1] == "memory of this machine"
