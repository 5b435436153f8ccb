"""The time limit for joining other processes: a process that waits in native code ends with one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.errors import BackendError
from tests.support.backends_available import require_backend
from tests.support.launched import TIMEOUT_S, run
from tests.support.small_run import write_config

WAITING = """
import ctypes, sys, time
from moezoo.core.distributed.startup import startup_limit
sleep = ctypes.PyDLL(None).sleep  # holds the interpreter's lock, as MLX does
with startup_limit(float(sys.argv[1]), "BackendError: nobody came"):
    print("waiting", flush=True)
    sleep(int(sys.argv[2]))
print("joined", flush=True)
time.sleep(float(sys.argv[3]))
"""


def waiting(limit: float, wait: int, then: float = 0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WAITING, str(limit), str(wait), str(then)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_process_that_waits_too_long_ends_with_one_line() -> None:
    began = time.monotonic()
    said, error = (process := waiting(0.2, 60)).communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL
    assert (said, error) == ("waiting\n", "BackendError: nobody came\n")
    assert time.monotonic() - began < 30


def test_process_that_joined_in_time_goes_on_beyond_the_limit() -> None:
    said, error = (process := waiting(1, 0, then=1.3)).communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert (said, error) == ("waiting\njoined\n", "")


@contextmanager
def on_interrupt(action: signal.Handlers) -> Iterator[None]:
    """Start processes with this action: a shell that starts a command in the background has it ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def test_interrupt_that_is_ignored_does_not_end_the_wait() -> None:
    with on_interrupt(signal.SIG_IGN):
        process = waiting(0.5, 60)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, error) == (-signal.SIGKILL, "BackendError: nobody came\n")


def test_interrupt_ends_the_wait() -> None:
    with on_interrupt(signal.SIG_DFL):
        process = waiting(60, 60)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("address", ["a:0", "a:65536", "a:99999", "a", ":1", "a:-1", "a:b"])
def test_address_without_a_possible_port_is_refused(address: str) -> None:
    with pytest.raises(BackendError, match="expected HOST:PORT of the first process with a port from 1 to 65535"):
        ProcessGroup(address, 2, 0)


@pytest.fixture
def ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


@pytest.mark.slow
def test_mlx_process_whose_peer_never_comes_ends_with_one_line(
    tmp_path: Path, ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_backend("mlx")
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]), encoding="utf-8")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", "0")
    lonely = run("train", write_config(tmp_path), "--backend", "mlx", "--out", tmp_path / "run", "--startup-timeout", 1)
    said, _ = lonely.communicate(timeout=TIMEOUT_S)
    assert lonely.returncode == -signal.SIGKILL
    (line,) = said.splitlines()
    assert line.startswith(
        "BackendError: MLX cannot reach the other processes; got MLX_RANK=0 and no answer within 1 s (--startup-timeout"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.release  # two starts of JAX
@pytest.mark.parametrize("index", [0, 1], ids=["peer never comes", "foreign service"])
def test_jax_process_without_its_group_ends_with_one_line(tmp_path: Path, ports: tuple[int, int], index: int) -> None:
    require_backend("jax")
    group = ("--coordinator", f"127.0.0.1:{ports[0]}", "--num-processes", 2, "--process-id", index)
    words = ("train", write_config(tmp_path), "--backend", "jax", "--out", tmp_path / "run", "--mesh", "data=auto")
    service = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(ports[0])]
    foreign = subprocess.Popen(service, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) if index else None
    try:
        lonely = run(*words, *group, "--startup-timeout", 2)
        said, _ = lonely.communicate(timeout=TIMEOUT_S)
    finally:
        if foreign is not None:
            foreign.kill()
            foreign.wait()
    assert lonely.returncode == -signal.SIGKILL
    (line,) = said.splitlines()
    assert line.startswith("BackendError: cannot join the other JAX processes within 2 s; got --coordinator 127.0.0.1:")


@pytest.mark.parametrize(
    ("rank", "hosts", "problem"),
    [
        ("a", [["127.0.0.1:1"], ["127.0.0.1:2"]], "MLX_RANK=a; expected a number from 0"),
        ("0", [], "expected a list of [HOST:PORT] of each process"),
        ("0", {"hosts": 1}, "expected a list of [HOST:PORT] of each process"),
        ("0", [1, 2], "expected a list of [HOST:PORT] of each process"),
        ("1", [["127.0.0.1:0"], ["127.0.0.1:0"]], "expected a list of [HOST:PORT] of each process"),
        ("1", [["127.0.0.1:99999"], ["127.0.0.1:1"]], "expected a list of [HOST:PORT] of each process"),
    ],
)
def test_variables_that_mlx_would_not_check_are_refused(
    rank: str, hosts: object, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_backend("mlx")
    from moezoo.mlx_backend.distributed import data_parallel

    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(hosts), encoding="utf-8")
    monkeypatch.setattr(os, "environ", os.environ | {"MLX_RANK": rank, "MLX_HOSTFILE": str(path)})
    with pytest.raises(BackendError, match="MLX cannot reach the other processes; got MLX_RANK=") as seen:
        data_parallel._join(1)
    assert problem in str(seen.value)
