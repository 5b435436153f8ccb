"""A child process with limits of time and memory, for input that a library processes without any of its own.

A chat template is a program, and a tokenizer's regular expression can take exponential time; both come with published
checkpoints. The child is a fresh Python that imports one module: it is neither forked, because JAX and tokenizers have
threads, nor does it import a framework, so that it starts in a tenth of a second.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, BinaryIO

_START_S = 60.0  # importing a module on a busy machine
_MAX_REPLY_BYTES = 1 << 27
_CHILD = """
import json, sys
setup = json.loads(sys.stdin.buffer.readline())
sys.path[:] = setup.pop("path")
from moezoo.core.limited_process import serve
serve(**setup)
"""


class LimitedProcessError(Exception):
    """A call that exceeded a limit, crashed, or raised; the message is one line of at most a few hundred characters."""


class LimitedProcess:
    """Calls of one function in a child process, which starts with the first call and is reused by the next.

    After a call that exceeds a limit the child is killed; the next call starts another. Calls are serialized, so that
    threads can share an object. The child ends with this process.
    """

    def __init__(self, function: str, *, seconds: float = 5.0, memory_bytes: int = 1 << 28) -> None:
        """`function` is `module:name` of a function from a JSON value to a JSON value, in a module quick to import.

        `seconds`: processor time of one call, and a quarter of the time that it may take on a busy machine.
        `memory_bytes`: memory of the child beyond what it has after importing the module.
        """
        self._setup = {"function": function, "seconds": seconds, "memory_bytes": memory_bytes}
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[[subprocess.Popen[bytes]], Any] | None = None

    def call(self, argument: Any) -> Any:
        """Return the function's value for a JSON value. Raises LimitedProcessError."""
        with self._lock:
            try:
                process = self._process or self._start()
                _send(process, argument)
                reply = _receive(process, 4 * self._seconds)
            except BaseException as error:
                self._end()
                if isinstance(error, OSError):
                    raise LimitedProcessError(f"its process cannot be used: {error}") from None
                raise
        if "error" in reply:
            raise LimitedProcessError(reply["error"])
        return reply["value"]

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for this process
        )
        self._stop = weakref.finalize(self, _end, process)
        _send(process, {"path": sys.path, **self._setup})
        _receive(process, _START_S)
        return process

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def _send(process: subprocess.Popen[bytes], value: Any) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, and _receive says how
        process.stdin.write(_encode(value))
        process.stdin.flush()


def _receive(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
    """Return the reply, the next line. Raises LimitedProcessError if there is none within the time."""
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    reply = bytearray()
    with selectors.DefaultSelector() as ready:  # select.select fails for the 1025th open file
        ready.register(process.stdout, selectors.EVENT_READ)
        while not reply.endswith(b"\n"):
            if not ready.select(max(0.0, deadline - time.monotonic())):
                raise LimitedProcessError(f"it took more than {seconds:g} s")
            more = os.read(process.stdout.fileno(), 1 << 20)
            if not more:
                raise LimitedProcessError(_how_it_ended(process))
            reply += more
            if len(reply) > _MAX_REPLY_BYTES:
                raise LimitedProcessError(f"its result has more than {_MAX_REPLY_BYTES} bytes")
    value: dict[str, Any] = json.loads(reply)
    return value


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    status = process.wait()
    if status == -signal.SIGXCPU:
        return "it took too much processor time"
    return f"its process ended with {signal.Signals(-status).name if status < 0 else f'status {status}'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


# --- in the child ----------------------------------------------------------------------------------------------------


def serve(function: str, seconds: float, memory_bytes: int) -> None:
    """Answer calls from standard input until it ends."""
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, _address_space_bytes() + memory_bytes)
    _write(replies, _encode({"ready": True}))
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds))
        _write(replies, _reply(call, line, memory_bytes))


def _reply(call: Any, line: bytes, memory_bytes: int) -> bytes:
    try:
        return _encode({"value": call(json.loads(line))})
    except MemoryError:
        return _encode({"error": f"it needs more than {memory_bytes >> 20} MiB of memory"})
    except BaseException as error:  # a panic of Rust code is no Exception
        return _encode({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


def _encode(value: Any) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"


def _write(replies: BinaryIO, reply: bytes) -> None:
    replies.write(reply)
    replies.flush()


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # macOS does not limit the address space; time is limited anyway
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _address_space_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 36  # macOS maps its shared libraries into each process
