"""Parent side of a contender's process: start, requests, shutdown. worker.py is the child side."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import moezoo
from moezoo.bench.contenders import Entry
from moezoo.bench.scheduling import prioritize
from moezoo.core.errors import BenchError

_LAST_LINES = 3


class Process:
    """A contender in its own process. Use it in a `with` block, which always ends the process."""

    def __init__(self, name: str, entry: Entry, environment: dict[str, str] | None = None):
        self.name = name
        variables = os.environ | (environment or {})
        for key, value in entry.environment.items():
            variables.pop(key, None)
            if value is not None:
                variables[key] = value
        root = str(Path(moezoo.__file__).resolve().parents[1])
        variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115  closed in `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moezoo.bench.worker", entry.maker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=variables,
            start_new_session=True,  # a scheduling group; Ctrl-C reaches only the benchmark, which ends it
        )
        self.pid = self._process.pid
        self.scheduling = prioritize(self.pid)

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """Send a request and return the answer. Raises BenchError: the contender has an error, or its process died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(self._crash_message(what))
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"contender {self.name} failed at request {what}: " + " ".join(answer["error"].split()))
        result: dict[str, Any] = answer["ok"]
        return result

    def close(self) -> None:
        """Kill the process and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _crash_message(self, what: str) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode("utf-8", "replace").splitlines()]
        lines = [line for line in lines if line.strip("^~ ")]  # without the markers below a line of a traceback
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        last = " | ".join(lines[-_LAST_LINES:]) or "nothing"
        return f"contender {self.name} {how} during request {what}; expected an answer. Its last output: {last}"
