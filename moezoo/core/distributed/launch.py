"""Launch several processes of one command on this machine, and end all of them when one fails.

Each process gets its rank in its framework's own way: MLX from environment variables (`MLX_RANK`, and `MLX_HOSTFILE`
with the address of each process), JAX from command-line options. The frameworks do all communication.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from moezoo.core.errors import TrainingError
from moezoo.core.signals import URGENT, Interrupted, handled_by

# Trap: a process whose peer has exited may block forever in a collective and then ignores SIGTERM. It cannot save a
# checkpoint without the peer, so it is killed after this time.
GRACE_S = 5.0
_SETTLING_S = 1.0
_POLL_INTERVAL_S = 0.05

NPROC = "MOEZOO_LAUNCH_NPROC"
"""Environment variable of each process: the number of processes, for the command that resumes the run."""


def launch(count: int, words: Sequence[str], backend: str) -> None:
    """Run `python -m moezoo WORDS` in `count` processes that form one process group, and wait for them.

    The first process writes to this terminal directly; lines of the others are prefixed with their rank. Stop signals
    (`core.signals`) are forwarded to all.

    Raises TrainingError: a process exited with an error or was killed by a signal. Raises Interrupted: a second
    SIGINT or SIGTERM arrived. In both cases the other processes are ended too, within GRACE_S.
    """
    with tempfile.TemporaryDirectory(prefix="moezoo-launch-") as folder:
        commands = process_commands(count, words, backend, Path(folder) / "hosts.json")
        processes: list[subprocess.Popen[bytes]] = []
        copied: list[threading.Thread] = []
        with _forwarded(processes):
            try:
                for index, (command, environment) in enumerate(commands):
                    process = _start(index, command, {**environment, NPROC: str(count)})
                    processes.append(process)
                    if process.stdout is not None:
                        copied.append(threading.Thread(target=_copy_lines, args=(index, process.stdout), daemon=True))
                        copied[-1].start()
                failed = _failures(processes)
            finally:
                _end(processes)
                for thread in copied:  # so that a process's last lines are printed before the error
                    thread.join(1.0)
    if failed:
        causes = "; ".join(f"process {index} of {count} {_describe_exit(status)}" for index, status in failed)
        raise TrainingError(f"{causes}. All processes were stopped; see their output above.")


def process_commands(
    count: int, words: Sequence[str], backend: str, hostfile: Path
) -> list[tuple[list[str], Mapping[str, str]]]:
    """Return the command line of each process, and the environment variables to set for it."""
    command = [sys.executable, "-m", "moezoo", *words]
    if count == 1:
        return [(command, {})]
    if backend == "jax":
        group = ["--coordinator", f"127.0.0.1:{_free_ports(1)[0]}", "--num-processes", str(count)]
        # Each process uses one GPU, or the CPU as one device.
        return [
            ([*command, *group, "--process-id", str(index)], {"JAX_LOCAL_DEVICE_IDS": str(index)})
            for index in range(count)
        ]
    # Trap: OpenBLAS starts one thread per core in each process; threads busy-wait, so processes compete for the cores.
    threads = os.environ.get("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]), encoding="utf-8")
    shared = {"MLX_HOSTFILE": str(hostfile), "OPENBLAS_NUM_THREADS": threads}
    return [(command, shared | {"MLX_RANK": str(index)}) for index in range(count)]


def _free_ports(count: int) -> list[int]:
    """Return ports of this machine that are not in use."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:  # all stay bound until all are chosen, so that the ports differ
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(index: int, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=None if index == 0 else subprocess.PIPE,
        stderr=None if index == 0 else subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,  # Trap: otherwise it gets Ctrl-C twice, from the terminal and from us
    )


def _copy_lines(index: int, lines: IO[bytes]) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(f"[{index}] {line.decode('utf-8', 'replace').rstrip()}\n")
            sys.stderr.flush()


@contextlib.contextmanager
def _forwarded(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Forward stop signals to all processes, which finish their step, save a checkpoint and exit.

    A second SIGINT or SIGTERM raises Interrupted, which ends all of them.
    """
    urgent = 0

    def forward(number: int, frame: object) -> None:
        nonlocal urgent
        urgent += number in URGENT
        for process in processes:  # in their own session, so they do not get the terminal's signals
            process.send_signal(number)  # no effect on a process that has exited
        if urgent == 2 and number in URGENT:  # not at a third, which would interrupt the cleanup
            raise Interrupted(number)

    with handled_by(forward):
        yield


def _failures(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Wait until a process fails or all succeed; return rank and exit status of each failed process, [] if none."""
    while not any(process.poll() for process in processes):
        if all(process.poll() == 0 for process in processes):
            return []
        time.sleep(_POLL_INTERVAL_S)
    # A process that only lost its peer may exit before the one that caused it: report all, killed ones first.
    deadline = time.monotonic() + _SETTLING_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_POLL_INTERVAL_S)
    failed = [(index, process.returncode) for index, process in enumerate(processes) if process.returncode]
    return sorted(failed, key=lambda pair: pair[1] > 0)


def _describe_exit(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate all processes, and kill those that have not exited within GRACE_S."""
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
