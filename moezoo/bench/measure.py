"""Timing of interleaved slices: contenders take turns, so that other load on the machine affects all of them."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from moezoo.bench.case import Case
from moezoo.bench.contenders import Entry
from moezoo.bench.foreign_load import foreign_load
from moezoo.bench.process import Process
from moezoo.core.errors import BenchError
from moezoo.core.progress import Progress

_MAX_STARTS = 3


@dataclass(frozen=True)
class Effort:
    """Measuring time: number of slices, each of at least one unit and about `slice_seconds`."""

    slices: int = 5
    slice_seconds: float = 1.0


@dataclass
class Timings:
    """Measurements of several cases.

    Fields:
        slices: seconds per unit of each slice, by contender and label.
        first_seconds: seconds of the first call, which may compile, by contender and label.
        foreign_load: mean share of the cores that other processes used in each slice, by contender and label; empty
            where that is not known.
        peak_memory: bytes, by contender.
        facts: versions, device, compute paths and scheduling, by contender.
        failed: error in one line, by contender; a failed contender is dropped.
    """

    slices: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    first_seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    foreign_load: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def seconds(self, contender: str, label: str) -> float | None:
        """Return the median of the slices; None if there are none."""
        slices = self.slices.get((contender, label))
        return median(slices) if slices else None


def take_turns(
    cases: Sequence[Case],
    entries: Mapping[str, Entry],
    effort: Effort,
    on_progress: Progress,
    timings: Timings,
    again: Callable[[Timings], Sequence[Case]] = lambda timings: (),
) -> None:
    """Time every case with every contender: warm up one after the other, then interleave slices A B C A B C ...

    Each contender has its own process. A contender that fails is recorded and dropped.

    Args:
        cases, entries: what is timed.
        effort: number and length of slices.
        on_progress: called with warm-ups and slices.
        timings: receives each measurement as soon as it is made.
        again: returns the cases that need a second round of slices.
    """
    done, total = 0, (1 + effort.slices) * sum(case.kind in entry.kinds for case in cases for entry in entries.values())
    processes: dict[str, Process] = {}

    def take_slices(cases: Sequence[Case], what: str) -> None:
        nonlocal done
        for turn in range(effort.slices):
            for case in cases:
                for name in [name for name in processes if case.kind in entries[name].kinds]:
                    on_progress(f"{what} {turn + 1} of {effort.slices}, {case.label}: {name}", done, total)
                    done += 1
                    shares = timings.foreign_load.setdefault((name, case.label), [])
                    pids = [process.pid for process in processes.values()]
                    with _recorded(timings, processes, name), foreign_load(pids, shares):
                        seconds = processes[name].ask("slice", label=case.label)["seconds"]
                        timings.slices.setdefault((name, case.label), []).append(seconds)

    with contextlib.ExitStack() as stack:
        for name, entry in entries.items():
            processes[name] = stack.enter_context(Process(name, entry))
            with _recorded(timings, processes, name):
                on_progress(f"{name}: starting", done, total)
                for case in cases:
                    if case.kind in entry.kinds:
                        on_progress(f"{name}: warming up, {case.label}", done, total)
                        done += 1
                        ready = processes[name].ask("prepare", case=case.to_json(), slice_seconds=effort.slice_seconds)
                        timings.first_seconds[name, case.label] = ready["first_seconds"]
                timings.facts[name] = _facts(processes[name])  # some are known only after a case
        take_slices(cases, "slice")
        repeated = again(timings)
        total = done + effort.slices * sum(case.kind in entries[name].kinds for case in repeated for name in processes)
        take_slices(repeated, "repeated slice")
        for name in list(processes):
            with _recorded(timings, processes, name):
                timings.peak_memory[name] = processes[name].ask("memory")["bytes"]


def time_starts(
    case: Case, entries: Mapping[str, Entry], effort: Effort, on_progress: Progress, timings: Timings
) -> None:
    """Time the startup of a process up to the end of its first training step, `cold` and `warm`.

    Cold: with empty compilation caches; warm: with the caches of the cold process. `on_progress` is called with starts,
    and `timings` receives each one.
    """
    running = dict(entries)
    turns = min(effort.slices, _MAX_STARTS)
    done, total = 0, num_starts(entries, effort)
    for turn in range(turns):
        for name in list(running):
            with tempfile.TemporaryDirectory() as folder, _recorded(timings, running, name):
                for label in ("cold", "warm"):
                    on_progress(f"start {turn + 1} of {turns}, {label}: {name}", done, total)
                    done += 1
                    shares = timings.foreign_load.setdefault((name, label), [])
                    begin = perf_counter()
                    with Process(name, running[name], _caches_in(Path(folder))) as process:
                        with foreign_load([process.pid], shares):
                            process.ask("first", case=case.to_json())
                        timings.slices.setdefault((name, label), []).append(perf_counter() - begin)
                        timings.facts[name] = _facts(process)


def num_starts(entries: Mapping[str, Entry], effort: Effort) -> int:
    """Return the number of starts that `time_starts` times."""
    return 2 * min(effort.slices, _MAX_STARTS) * len(entries)


def _facts(process: Process) -> dict[str, str]:
    return {**process.ask("facts"), "scheduling": process.scheduling}


def _caches_in(folder: Path) -> dict[str, str]:
    """Return environment variables that put all compilation caches into a folder."""
    for name in ("cache", "temporary"):
        (folder / name).mkdir(exist_ok=True)
    cache, temporary = str(folder / "cache"), str(folder / "temporary")
    return {
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "MOEZOO_CACHE": f"{cache}/moezoo",
        "XDG_CACHE_HOME": cache,
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TMPDIR": temporary,
    }


@contextlib.contextmanager
def _recorded(timings: Timings, running: dict[str, Any], name: str) -> Iterator[None]:
    """Record a contender that fails in this block, and drop it."""
    try:
        yield
    except BenchError as error:
        timings.failed[name] = str(error)
        dropped = running.pop(name)
        if isinstance(dropped, Process):
            dropped.close()
