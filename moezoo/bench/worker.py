"""The process of one contender: `python -m moezoo.bench.worker MODULE:FUNCTION`. See process.py for the other side.

It reads one JSON object a line from its standard input, and answers each with one line: `{"ok": ...}`, or
`{"error": ...}` for what a person can mend. It ends, whatever it is doing, when its standard input does, so that a
benchmark that is killed leaves nothing behind.
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

_MOST_REPEATS = 1000


class Worker:
    """Answers requests about one contender."""

    def __init__(self, contender: Contender):
        self._contender = contender
        self._works: dict[str, tuple[Work, int]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a request asks for: `facts`, `first`, `prepare`, `slice` or `memory`."""
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
        """Warm up, and find how many units make a slice."""
        work = self._contender.prepare(case)
        begin = perf_counter()
        work(1)
        first = perf_counter() - begin
        repeats = 1
        if slice_seconds > 0:
            begin = perf_counter()
            work(1)
            whole = perf_counter() - begin  # of decoding, with the prompt
            repeats = max(1, min(_MOST_REPEATS, round(slice_seconds / max(whole, 1e-6))))
        self._works[case.label] = (work, repeats)
        return {"first_seconds": first, "repeats": repeats}


def peak_memory() -> int:
    """The most memory that this process ever held, in bytes."""
    # Trap: on Linux `ru_maxrss` begins with what the process that started this one held.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Serve until the standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other side is told too, and ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the answers
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
