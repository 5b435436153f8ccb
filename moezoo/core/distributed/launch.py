"""Starts several processes of one command on this machine, and ends all of them when one fails.

What a process is told is what its framework wants to hear: MLX reads who is who from the environment (`MLX_RANK`, and
`MLX_HOSTFILE` with an address of each), JAX gets options. Everything between the processes is the framework's own.
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

# Trap: a process whose peer has gone may wait for ever, and is then deaf to SIGTERM. It cannot save without the peer.
GRACE_S = 5.0
_SETTLING_S = 1.0
_LOOK_EVERY_S = 0.05


def launch(count: int, words: Sequence[str], backend: str) -> None:
    """Run `python -m moezoo WORDS` as `count` processes that are one group of the backend, and wait for them.

    The first one has this terminal; lines of the others begin with their number. SIGINT and SIGTERM reach all.

    Raises TrainingError: a process ended with an error, or by a signal. Raises KeyboardInterrupt at a second signal.
    Either way the others are gone then, too, at most GRACE_S later.
    """
    with tempfile.TemporaryDirectory(prefix="moezoo-launch-") as folder:
        commands = process_commands(count, words, backend, Path(folder) / "hosts.json")
        processes: list[subprocess.Popen[bytes]] = []
        copied: list[threading.Thread] = []
        with _forwarded(processes):
            try:
                for index, (command, environment) in enumerate(commands):
                    process = _start(index, command, environment)
                    processes.append(process)
                    if process.stdout is not None:
                        copied.append(threading.Thread(target=_copy_lines, args=(index, process.stdout), daemon=True))
                        copied[-1].start()
                failed = _failures(processes)
            finally:
                _end(processes)
                for thread in copied:  # its last words come before ours
                    thread.join(1.0)
    if failed:
        told = "; ".join(f"process {index} of {count} {_how(status)}" for index, status in failed)
        raise TrainingError(f"{told}. None is left; see above what was said.")


def process_commands(
    count: int, words: Sequence[str], backend: str, hostfile: Path
) -> list[tuple[list[str], Mapping[str, str]]]:
    """Of each process its command line, and what is put into its environment."""
    command = [sys.executable, "-m", "moezoo", *words]
    if count == 1:
        return [(command, {})]
    if backend == "jax":
        group = ["--coordinator", f"127.0.0.1:{_free_ports(1)[0]}", "--num-processes", str(count)]
        # On GPUs each has one of its own; a CPU is one device for each process.
        return [
            ([*command, *group, "--process-id", str(index)], {"JAX_LOCAL_DEVICE_IDS": str(index)})
            for index in range(count)
        ]
    # Trap: OpenBLAS gives each process a thread a core; they spin while they wait, and take the cores from each other.
    threads = os.environ.get("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]), encoding="utf-8")
    shared = {"MLX_HOSTFILE": str(hostfile), "OPENBLAS_NUM_THREADS": threads}
    return [(command, shared | {"MLX_RANK": str(index)}) for index in range(count)]


def _free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:  # all are held until all are chosen, so that they differ
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(index: int, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=None if index == 0 else subprocess.PIPE,
        stderr=None if index == 0 else subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,  # Trap: else Ctrl-C reaches it twice, from the terminal and from us
    )


def _copy_lines(index: int, lines: IO[bytes]) -> None:
    with lines:
        for line in lines:
            sys.stderr.write(f"[{index}] {line.decode('utf-8', 'replace').rstrip()}\n")
            sys.stderr.flush()


@contextlib.contextmanager
def _forwarded(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGINT and SIGTERM go to all processes, which end their step, save and stop; so does the end of the terminal.

    At the second one all are ended.
    """
    # Sessions of their own do not hear of it. Under nohup it is ignored, and stays so.
    heard = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []

    signals = 0

    def forward(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1
        for process in processes:
            process.send_signal(number)  # does nothing where it has ended
        if signals == 2:  # not at a third, which would interrupt the ending
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, *heard)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _failures(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Which processes failed, and their status, soon after the first did; [] when all have ended well."""
    while not any(process.poll() for process in processes):
        if all(process.poll() == 0 for process in processes):
            return []
        time.sleep(_LOOK_EVERY_S)
    # One that only lost its peer may be gone before the one that was the cause: all are told, the killed ones first.
    deadline = time.monotonic() + _SETTLING_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_LOOK_EVERY_S)
    failed = [(index, process.returncode) for index, process in enumerate(processes) if process.returncode]
    return sorted(failed, key=lambda pair: pair[1] > 0)


def _how(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
