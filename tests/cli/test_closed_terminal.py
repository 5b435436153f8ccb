"""Whole runs in an interactive shell whose terminal closes, and runs that get two signals."""

import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moezoo.core.checkpoint.store import list_checkpoints
from moezoo.core.training.metrics import read_metrics
from tests.support.backends_available import require_backend
from tests.support.small_run import write_config

pytestmark = [pytest.mark.release, pytest.mark.slow]
TIMEOUT_S = 120


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def command_of(backend: str, folder: Path, steps: int) -> list[str]:
    require_backend(backend)
    config = write_config(folder, steps=steps)
    return [sys.executable, "-m", "moezoo", "train", str(config), "--backend", backend, "--out", str(folder / "run")]


def steps_of(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder / "run" / "metrics.jsonl")), default=0)


@pytest.mark.parametrize(("backend", "disowned"), [("jax", False), ("mlx", False), ("mlx", True)])
def test_closed_terminal(backend: str, disowned: bool, tmp_path: Path) -> None:
    """A run in the foreground is saved; a disowned one trains to its end without a terminal."""
    command = f"{shlex.join(command_of(backend, tmp_path, 300 if disowned else 100_000))}; exit"
    command = f"{command.removesuffix('; exit')} & disown" if disowned else command
    shell, terminal = pty.fork()
    if shell == 0:
        os.execvp("bash", ["bash", "--norc", "-i"])
    os.write(terminal, f"{command}\n".encode())
    wait_for(lambda: steps_of(tmp_path) > 3)
    os.close(terminal)
    os.waitpid(shell, 0)
    wait_for(lambda: list_checkpoints(tmp_path / "run" / "checkpoints"))
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.step == (300 if disowned else steps_of(tmp_path))
    wait_for(lambda: (tmp_path / "run" / "picture.png").exists())


@pytest.mark.parametrize("backend", ["jax", "mlx"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_with_its_status(backend: str, number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(command_of(backend, tmp_path, 100_000), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "compiling" in line)
        process.send_signal(number)
        next(line for line in process.stdout if line.startswith("stopping: "))
        process.send_signal(number)
        began = time.monotonic()
        # The first one may have been obeyed already: then the run is saved, and the process ends or is killed.
        assert process.wait(TIMEOUT_S) in (128 + number, 0, -number)
        assert time.monotonic() - began < 5
