"""This side of a contender's process: start it, ask it, end it. See worker.py for the other."""

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
from moezoo.core.errors import BenchError

_LAST_LINES = 3


class Process:
    """One contender in a process of its own. Use it in a `with` block, which ends the process whatever happens."""

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
        )

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """The answer to one request. Raises BenchError, in one line: the contender refused, or its process died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchError(self._last_words(what))
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"contender {self.name} cannot {what}: " + " ".join(answer["error"].split()))
        result: dict[str, Any] = answer["ok"]
        return result

    def close(self) -> None:
        """End the process, and wait until it is gone."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _last_words(self, what: str) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode("utf-8", "replace").splitlines()]
        said = [line for line in lines if line.strip("^~ ")]  # without the marks under a line of a traceback
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        words = " | ".join(said[-_LAST_LINES:]) or "nothing"
        return f"contender {self.name} {how} while asked to {what}; expected an answer. Its last words: {words}"
