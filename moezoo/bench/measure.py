"""Timing: contenders take turns, slice by slice, so that whatever else the machine does is shared by all of them."""

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
from moezoo.bench.process import Process
from moezoo.core.errors import BenchError

Tell = Callable[[str], None]

_MOST_STARTS = 3


@dataclass(frozen=True)
class Effort:
    """How long is measured: so many slices of at least one unit and about so many seconds each."""

    slices: int = 5
    slice_seconds: float = 1.0


@dataclass
class Timings:
    """What was measured of some cases.

    Fields:
        slices: seconds a unit of each slice, by contender and label.
        first_seconds: of the first call, which may compile, by contender and label.
        peak_memory: bytes, by contender.
        facts: what a contender says of itself.
        failed: by contender, one line; it took no part from then on.
    """

    slices: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    first_seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def seconds(self, contender: str, label: str) -> float | None:
        """The median of the slices; None where there are none."""
        measured = self.slices.get((contender, label))
        return median(measured) if measured else None


def take_turns(cases: Sequence[Case], entries: Mapping[str, Entry], effort: Effort, tell: Tell) -> Timings:
    """Time every case with every contender: each in its process, warmed up one after the other, then A B C A B C ...

    `tell` is called with what is being done. A contender that fails is noted, and the others go on.
    """
    timings = Timings()
    with contextlib.ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name, entry in entries.items():
            processes[name] = stack.enter_context(Process(name, entry))
            with _noted(timings, processes, name):
                tell(f"{name}: starting")
                timings.facts[name] = processes[name].ask("facts")
                for case in cases:
                    if case.kind in entry.kinds:
                        tell(f"{name}: warming up, {case.label}")
                        ready = processes[name].ask("prepare", case=case.to_json(), slice_seconds=effort.slice_seconds)
                        timings.first_seconds[name, case.label] = ready["first_seconds"]
        for turn in range(effort.slices):
            for case in cases:
                for name in list(processes):
                    if case.kind not in entries[name].kinds:
                        continue
                    tell(f"slice {turn + 1} of {effort.slices}, {case.label}: {name}")
                    with _noted(timings, processes, name):
                        seconds = processes[name].ask("slice", label=case.label)["seconds"]
                        timings.slices.setdefault((name, case.label), []).append(seconds)
        for name in list(processes):
            with _noted(timings, processes, name):
                timings.peak_memory[name] = processes[name].ask("memory")["bytes"]
    return timings


def time_starts(case: Case, entries: Mapping[str, Entry], effort: Effort, tell: Tell) -> Timings:
    """Seconds from the start of a process to the end of its first training step, `cold` and `warm`.

    Cold: with folders for compiled programs that are empty; warm: with what the cold process left there.
    """
    timings = Timings()
    running = dict(entries)
    turns = min(effort.slices, _MOST_STARTS)
    for turn in range(turns):
        for name in list(running):
            with tempfile.TemporaryDirectory() as folder, _noted(timings, running, name):
                for label in ("cold", "warm"):
                    tell(f"start {turn + 1} of {turns}, {label}: {name}")
                    begin = perf_counter()
                    with Process(name, running[name], _caches_in(Path(folder))) as process:
                        process.ask("first", case=case.to_json())
                        timings.slices.setdefault((name, label), []).append(perf_counter() - begin)
                        timings.facts[name] = process.ask("facts")
    return timings


def _caches_in(folder: Path) -> dict[str, str]:
    """Variables that send everything that is kept of compiling to a folder."""
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
def _noted(timings: Timings, running: dict[str, Any], name: str) -> Iterator[None]:
    """A contender that fails here is noted, and no longer runs."""
    try:
        yield
    except BenchError as error:
        timings.failed[name] = str(error)
        dropped = running.pop(name)
        if isinstance(dropped, Process):
            dropped.close()
