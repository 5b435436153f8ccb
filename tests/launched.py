"""Runs of several processes on this machine, by `moezoo launch`."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from moezoo.core.metrics import read_metrics

TIMEOUT_S = 120.0


def start(*words: object, count: int = 2) -> subprocess.Popen[str]:
    """`moezoo launch`, whose output comes together. Its JAX processes have one device each, and its own folder."""
    command = [sys.executable, "-m", "moezoo", "launch", "--nproc", count, *words]
    return subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def train(backend: str, config: Path, out: Path, *words: object, count: int = 2) -> str:
    """A run that ends well, and what it said."""
    running = start("train", config, "--backend", backend, "--out", out, *words, count=count)
    said, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 0, said
    return said


def begun(
    backend: str, config: Path, out: Path, *words: object, steps: int = 3
) -> tuple[subprocess.Popen[str], list[int]]:
    """A run without an end that has made some steps, and the process ids of its two processes."""
    more = ("--set", "training.steps=100000")
    running = start("train", config, "--backend", backend, "--out", out, *more, *words)
    deadline = time.monotonic() + TIMEOUT_S
    while len(read_metrics(out / "metrics.jsonl")) < steps:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    listed = subprocess.check_output(["pgrep", "-P", str(running.pid)], text=True)
    return running, sorted(int(word) for word in listed.split())


def lines(out: Path) -> list[dict[str, Any]]:
    """What a run wrote of its steps."""
    return [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
