"""Helpers for runs of several processes on this machine with `moezoo launch`."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.training.metrics import read_metrics

TIMEOUT_S = 120.0


def run(*words: object) -> subprocess.Popen[str]:
    """Start `moezoo` in a subprocess, stdout and stderr combined. A JAX process has the CPU as one device."""
    return subprocess.Popen(
        [str(word) for word in (sys.executable, "-m", "moezoo", *words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def start(*words: object, count: int = 2) -> subprocess.Popen[str]:
    """Start `moezoo launch`."""
    return run("launch", "--nproc", count, *words)


def train(backend: str, config: Path, out: Path, *words: object, count: int = 2) -> str:
    """Run training to a successful end, and return its output; that of one process runs in this one."""
    if count == 1:
        given = [str(word) for word in ("train", config, "--backend", backend, "--out", out, *words)]
        result = CliRunner().invoke(main, given)
        assert result.exit_code == 0, result.output
        return result.output
    running = start("train", config, "--backend", backend, "--out", out, *words, count=count)
    output, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 0, output
    return output


def begun(
    backend: str, config: Path, out: Path, *words: object, steps: int = 3
) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run without end and wait for some steps; return it and the ids of its two processes."""
    more = ("--set", "training.steps=100000")
    running = start("train", config, "--backend", backend, "--out", out, *more, *words)
    await_steps(running, out, steps)
    listed = subprocess.check_output(["pgrep", "-P", str(running.pid)], text=True)
    return running, sorted(int(word) for word in listed.split())


def await_steps(running: subprocess.Popen[str], out: Path, steps: int = 3) -> None:
    """Wait until a run has written the metrics of `steps` steps."""
    deadline = time.monotonic() + TIMEOUT_S
    while len(read_metrics(out / "metrics.jsonl")) < steps:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_ends_with_the_first(backend: str, config: Path, existing: Path, *words: object) -> None:
    """Check that a group whose first process fails (its folder contains a run) ends with one error line of each."""
    running = start("train", config, "--backend", backend, "--out", existing, *words)
    output, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    assert "already contains a run" in output
    assert "TrainingError: process 0 of 2 exited with status 1" in output
    assert "Traceback" not in output


def lines(out: Path) -> list[dict[str, Any]]:
    """Read a run's training records."""
    return [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
