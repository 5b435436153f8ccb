"""Scheduling group of a contender's process (Linux's autogroup, man 7 sched)."""

from pathlib import Path

_NICE = -9
_PROC = Path("/proc")


def prioritize(pid: int) -> str:
    """Raise the priority of the session that a process leads; return a description of its scheduling.

    Linux divides the cores between sessions first (`sched_autogroup_enabled`), and a nice value counts inside a session
    only. A contender in the session of its terminal would share one part with everything else that runs there, and get
    half of the cores beside any other busy session.
    """
    enabled, group = _PROC / "sys/kernel/sched_autogroup_enabled", _PROC / str(pid) / "autogroup"
    try:
        if enabled.read_text().strip() != "1":
            return "shared with all processes"
        group.write_text(str(_NICE))
    except FileNotFoundError:
        return "the system's"
    except OSError:  # a negative nice value is for root
        return "own group"
    return f"own group, nice {group.read_text().split()[-1]}"
