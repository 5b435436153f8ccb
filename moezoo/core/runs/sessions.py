"""Record of the processes that trained a run: with which version, command, data and devices, and when.

`<run>/sessions.jsonl` has two lines for each start or resume, the second when it ends; a killed process leaves only the
first. The file is for people and for `moezoo runs`: no training depends on it.
"""

import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moezoo.core.data.prepare import SourceSummary
from moezoo.core.files import PACKAGE, read_bounded, reason_of
from moezoo.core.json_text import parse_json
from moezoo.core.runs.run_data import data_record

SESSIONS_FILE = "sessions.jsonl"
_MAX_BYTES = 10_000_000
_GIT_S = 5.0


def describe_session(
    command: str, versions: Mapping[str, str], facts: Mapping[str, str], processes: int, data: Sequence[SourceSummary]
) -> dict[str, Any]:
    """Return the facts on this process that its session records.

    Args:
        command: the command line, or the call.
        versions: of moezoo, Python and other packages, by name.
        facts: of the backend, by name: device, compute paths.
        processes: number of processes that train together.
        data: the sources, whose tokens and digests are recorded.
    """
    return {
        "started": now(),
        "command": command,
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "processes": processes,
        "versions": dict(versions),
        "commit": commit(),
        "facts": dict(facts),
        "data": data_record(data),
    }


def now() -> str:
    """Return the local time with its offset from UTC: `2026-11-30T04:55:00+01:00`."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def commit(folder: Path = PACKAGE.parent) -> str | None:
    """Return the commit of moezoo's checkout, with `-dirty` if files differ from it; None if it is none."""
    if not (folder / ".git").exists():
        return None
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def append_line(run: Path, values: Mapping[str, Any]) -> None:
    """Append a line to the sessions of a run folder that exists. Raises OSError."""
    with (run / SESSIONS_FILE).open("ab") as file:
        is_whole = file.tell() == 0 or read_bounded(run / SESSIONS_FILE, _MAX_BYTES).endswith(b"\n")
        file.write(b"" if is_whole else b"\n")
        file.write(json.dumps(values).encode() + b"\n")


def read_sessions(run: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Read the sessions of a run, each with what its second line adds; [] without a file.

    `problems`: a line for the user about a file or lines that cannot be read is added.
    """
    path, found = run / SESSIONS_FILE, list[dict[str, Any]]()
    if not os.path.lexists(path):
        return found
    try:
        content = read_bounded(path, _MAX_BYTES)
    except OSError as error:
        problems.append(f"{path} cannot be read and was ignored ({reason_of(error)})")
        return found
    damaged = 0
    for line in io.BytesIO(content):
        try:
            values = parse_json(line)
        except ValueError:
            values = None
        if isinstance(values, dict) and isinstance(values.get("started"), str):
            found.append(values)
        elif isinstance(values, dict) and isinstance(values.get("ended"), str) and found:
            found[-1] |= values
        else:
            damaged += 1
    if damaged:
        problems.append(f"{damaged} lines of {path} are damaged and were ignored")
    return found
