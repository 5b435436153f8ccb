"""Attacks on running processes: kills, closed terminals, full disks, and two processes on one run.

Each attempt starts `moezoo train`, attacks it, resumes it, and compares the end with a run that nobody disturbed: the
same parameters and optimizer state bit for bit, and the same lines of metrics.jsonl, each once.
"""

import contextlib
import hashlib
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moezoo.core.runs.run_folder import load_run
from tests.support.small_run import write_config
from tests.torture.files import attempt
from tests.torture.outcome import FAULT, Outcome

STEPS, TIMEOUT_S = 12, 300
# A kill at the n-th operation on files below a folder: every stage of every save comes up.
KILL_AT = """
import os, signal, sys
left, folder = [int(sys.argv.pop(1))], sys.argv.pop(1)
def count(event, details):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and folder in str(details[0]):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
from moezoo.cli.main import main
main()
"""


@dataclass(frozen=True)
class Way:
    """A way to train: backend, mesh and environment."""

    name: str
    options: tuple[str, ...]
    environment: dict[str, str]


WAYS = (
    Way("mlx", ("--backend", "mlx"), {}),
    Way("jax", ("--backend", "jax"), {}),
    Way(
        "mesh",
        ("--backend", "jax", "--mesh", "fsdp=2,tensor=2"),
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    ),
)


class Training:
    """A small config, and its run that nobody disturbed, in one way of training."""

    def __init__(self, folder: Path, way: Way):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.way = folder, way
        self.config = write_config(folder, steps=STEPS, batch_size=4, checkpoint_every=2, validate_every=5)
        self.run = folder / "run"

    @cached_property
    def expected(self) -> tuple[str, list[str]]:
        """State of the undisturbed run; `duration` is measured with it."""
        shutil.rmtree(self.run, ignore_errors=True)
        start = time.monotonic()
        status, output = self.finish(self.start())
        assert status == 0, output
        self.duration = time.monotonic() - start
        return self.state()

    def start(self, *more: str, prefix: tuple[str, ...] = ("-m", "moezoo"), **options: object) -> subprocess.Popen[str]:
        """Start `moezoo train` on the run folder."""
        words = [sys.executable, *prefix, "train", str(self.config), "--out", str(self.run), *self.way.options, *more]
        environment = os.environ | self.way.environment | {"MOEZOO_CACHE": str(self.folder / "cache")}
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
        return subprocess.Popen(words, env=environment, **given)  # type: ignore[call-overload,no-any-return]

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait for a process; return its status and output. A process that hangs is killed, with status -9."""
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output = f"hung for {TIMEOUT_S} s\n" + (process.communicate()[0] or "")
        return process.returncode, output or ""

    def state(self) -> tuple[str, list[str]]:
        """Digest of the newest checkpoint, and the metrics without speeds; read in a child, which may start threads."""
        word, text = attempt(lambda: json.dumps(self._read_state()))
        digest, lines = json.loads(text) if word == "read" else (f"{word}: {text}", [])
        return digest, lines

    def _read_state(self) -> tuple[str, list[str]]:
        _, _, checkpoint, _ = load_run(self.run)
        digest = hashlib.sha256(str(checkpoint.step).encode())
        for tensors in (checkpoint.weights, checkpoint.optimizer or {}):
            for name in sorted(tensors):
                digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return digest.hexdigest(), [json.dumps(line | {"tokens_per_second": None, "crc32": None}) for line in lines]

    @property
    def resume(self) -> tuple[str, ...]:
        """The option that resumes the run; none if it was killed before its first step and is no run yet."""
        return ("--resume",) if (self.run / "config.yaml").exists() else ()

    def resumed_problem(self) -> str | None:
        """Resume the run to its end; return what is wrong with it, or None."""
        status, output = self.finish(self.start(*self.resume))
        if status:
            return f"resume ended with {status}: {output[-1500:]}"
        left = [str(path) for path in self.run.rglob("*.partial")] + [*map(str, self.folder.glob(".*.partial"))]
        if left:
            return f"left behind: {left}"
        state, expected = self.state(), self.expected
        if state[0] != expected[0]:
            return f"parameters or optimizer state differ from the undisturbed run: {state[0]}"
        if state[1] != expected[1]:
            missing, more = (
                Counter(one) - Counter(other) for one, other in ((expected[1], state[1]), (state[1], expected[1]))
            )
            return (
                f"metrics.jsonl differs: missing {[line[:90] for line in missing]}, more {[line[:90] for line in more]}"
            )
        return None


Attempt = Callable[[Training, random.Random], tuple[str, str | None]]
"""Attacks a training; returns what was done and a problem, or None if all held."""


class Attack:
    """Attacks on one training process at a time."""

    def __init__(self, name: str, training: Training, attempt: Attempt):
        self.name, self._training, self._attempt = f"{name}, {training.way.name}", training, attempt

    def run(self, number: int, seed: int) -> Outcome:
        """Attack a fresh run, resume it to its end, and compare."""
        training = self._training
        _ = training.expected
        shutil.rmtree(training.run, ignore_errors=True)
        detail, problem = self._attempt(training, random.Random(f"{seed} {self.name} {number}"))
        problem = problem or training.resumed_problem()
        if problem is not None:
            return Outcome(self.name, number, FAULT, f"{detail}: {problem}")
        return Outcome(self.name, number, "resumed, bit-equal", detail)


def kill(training: Training, draw: random.Random) -> tuple[str, str | None]:
    """SIGKILL at a random moment, sometimes twice."""
    moments = []
    for _ in range(draw.choice([1, 1, 2])):
        process = training.start(*training.resume)
        moments.append(draw.uniform(0.2, 1) * training.duration)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=moments[-1])
        process.kill()
        training.finish(process)
    return "after " + ", ".join(f"{moment:.2f} s" for moment in moments), None


def kill_at_stage(training: Training, draw: random.Random) -> tuple[str, str | None]:
    """SIGKILL at the n-th operation on a file of the run: at every stage of creating and saving it."""
    number = draw.randrange(1, 160)
    process = training.start(prefix=("-c", KILL_AT, str(number), str(training.run)))
    status, output = training.finish(process)
    if status not in (0, -signal.SIGKILL):
        return f"operation {number}", f"ended with {status}: {output[-1500:]}"
    return f"operation {number}", None


def close_terminal(training: Training, draw: random.Random) -> tuple[str, str | None]:
    """Run in a terminal and close it: SIGHUP, and every later write fails with EIO."""
    mine, theirs = pty.openpty()
    process = training.start(
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=_controlling(theirs),
    )
    os.close(theirs)
    moment = draw.uniform(0.2, 1) * training.duration
    deadline = time.monotonic() + moment
    os.set_blocking(mine, False)
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.read(mine, 1 << 16)
        time.sleep(0.02)
    os.close(mine)
    try:
        status = process.wait(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"after {moment:.2f} s", "did not end"
    return f"after {moment:.2f} s", None if status in (
        0,
        128 + signal.SIGHUP,
        -signal.SIGHUP,
        1,
    ) else f"status {status}"


def _controlling(terminal: int) -> Callable[[], None]:
    """Make a terminal the controlling one of a child in a session of its own."""
    import fcntl
    import termios

    def in_child() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    return in_child


def close_pipe(training: Training, draw: random.Random) -> tuple[str, str | None]:
    """`moezoo train | head -n`: training continues without its console."""
    lines = draw.randrange(0, 20)
    process = training.start()
    assert process.stdout is not None
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    status = process.wait(timeout=TIMEOUT_S)
    return f"after {lines} lines", None if status == 0 else f"status {status}"


def fill_disk(training: Training, draw: random.Random) -> tuple[str, str | None]:
    """A limit on file sizes, as a full disk: one error, and the run can be resumed without the limit."""
    largest = max(path.stat().st_size for path in training.folder.rglob("*") if path.is_file())
    limit = int(draw.uniform(0, 1.1) ** 3 * largest) + 1

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status, output = training.finish(training.start(preexec_fn=limited))
    errors = [line for line in output.splitlines() if "Error" in line]
    problem = None
    if status < 0 or "Traceback" in output or len(errors) > 1 or (status > 0 and len(errors) != 1):
        problem = f"status {status}, {len(errors)} lines with Error: {output[-1500:]}"
    return f"limit {limit} bytes", problem


def start_two(training: Training, draw: random.Random) -> tuple[str, str | None]:
    """Two processes resume one run at once: one gets one line, the other trains."""
    first = training.start("--set", f"training.steps={STEPS}")
    with contextlib.suppress(subprocess.TimeoutExpired):
        first.communicate(timeout=draw.uniform(0.5, 1) * training.duration)
    first.send_signal(signal.SIGTERM)
    training.finish(first)
    both = [training.start(*training.resume) for _ in range(2)]
    ends = [training.finish(process) for process in both]
    refused = [output for status, output in ends if status]
    problem = None
    if len(refused) == 2 or any("Traceback" in output for _, output in ends):
        problem = f"both ended badly: {[(status, output[-700:]) for status, output in ends]}"
    return f"{len(refused)} refused", problem


ATTEMPTS: dict[str, Attempt] = {
    "kill": kill,
    "kill at a stage of saving": kill_at_stage,
    "terminal closed": close_terminal,
    "pipe closed": close_pipe,
    "disk full": fill_disk,
    "two processes": start_two,
}
