"""Child process of a contender: `python -m moezoo.bench.worker MODULE:FUNCTION`. process.py is the parent side.

It reads one JSON object per line from stdin and answers each with one line: `{"ok": ...}`, or `{"error": ...}` for
errors that users can fix. It exits as soon as stdin is closed, so that a killed benchmark leaves no processes.
"""

import importlib
import json
import os
import queue
import resource
import signal
import sys
import threading
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from moezoo.bench.case import Case, Contender, Work
from moezoo.core.errors import MoezooError
from moezoo.core.garbage import collect_seldom

_MAX_REPEATS = 1000


class Worker:
    """Server of requests for one contender."""

    def __init__(self, contender: Contender):
        self._contender = contender
        self._works: dict[str, tuple[Work, int]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request: `facts`, `first`, `prepare`, `slice` or `memory`."""
        match request["do"]:
            case "facts":
                return self._contender.facts()
            case "first":
                return {"seconds": self._contender.prepare(Case.from_json(request["case"]))(1)}
            case "prepare":
                return self._prepare(Case.from_json(request["case"]), request["slice_seconds"])
            case "slice":
                work, repeats = self._works[request["label"]]
                return {"seconds": work(repeats) / repeats}
            case "memory":
                return {"bytes": peak_memory()}
            case unknown:
                raise ValueError(f"no such request: {unknown}")

    def _prepare(self, case: Case, slice_seconds: float) -> dict[str, Any]:
        """Warm up, and compute the number of units per slice."""
        work = self._contender.prepare(case)
        begin = perf_counter()
        work(1)
        first = perf_counter() - begin
        repeats = 1
        if slice_seconds > 0:
            begin = perf_counter()
            work(1)
            unit = perf_counter() - begin  # for decoding, including the prefill
            repeats = max(1, min(_MAX_REPEATS, round(slice_seconds / max(unit, 1e-6))))
        self._works[case.label] = (work, repeats)
        return {"first_seconds": first, "repeats": repeats}


def peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    # Trap: on Linux, the initial value of `ru_maxrss` is that of the parent process.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Serve requests until stdin is closed."""
    for number in (signal.SIGINT, signal.SIGHUP):  # the parent ends this process
        signal.signal(number, signal.SIG_IGN)
    collect_seldom()  # as the command line does
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the answers
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    module, function = sys.argv[1].split(":")
    worker: Worker | None = None
    while True:
        request = json.loads(requests.get())
        try:
            if worker is None:
                worker = Worker(getattr(importlib.import_module(module), function)())
            _say(answers, {"ok": worker.answer(request)})
        except MoezooError as error:
            _say(answers, {"error": f"{type(error).__name__}: {error}"})


def _read(requests: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
