"""Stop signals: each asks once, a second SIGINT or SIGTERM ends at once, and both are answered during a computation."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from moezoo.core.signals import Interrupted, stop_on_signal, stop_signals

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def send(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))


@pytest.fixture
def ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", NAMES)
def test_signal_asks_to_stop_once_and_its_handler_is_restored(name: str) -> None:
    before, answered = signal.getsignal(getattr(signal, name)), threading.Event()
    with stop_on_signal(answered.set) as stop:
        assert not stop.is_set()
        send(name)
        assert stop.is_set()
        assert answered.wait(5)
    assert signal.getsignal(getattr(signal, name)) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_closed_terminal_sends_two_signals_and_still_saves() -> None:
    with stop_on_signal(lambda: None) as stop:
        send("SIGHUP", "SIGHUP", "SIGTERM")
        assert stop.is_set()


@pytest.mark.parametrize(("names", "status"), [(("SIGINT", "SIGINT"), 130), (("SIGUSR1", "SIGINT", "SIGTERM"), 143)])
def test_second_urgent_signal_ends_at_once(names: tuple[str, ...], status: int) -> None:
    with pytest.raises(Interrupted) as seen, stop_on_signal(lambda: None):
        send(*names)
    assert seen.value.exit_status == status


def test_signal_that_nohup_ignores_stays_ignored(ignored: None) -> None:
    assert signal.SIGHUP not in stop_signals()
    with stop_on_signal(lambda: None) as stop:
        send("SIGHUP")
        assert not stop.is_set()


def test_signal_is_answered_while_a_computation_runs() -> None:
    """Key derivation runs outside of Python, without the interpreter's lock, as frameworks do."""
    answered: list[float] = []
    with stop_on_signal(lambda: answered.append(time.monotonic())):
        threading.Timer(0.05, send, ("SIGTERM",)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 600_000)
        ended = time.monotonic()
    assert answered[0] < ended - 0.05


def test_second_signal_ends_a_process_that_computes() -> None:
    program = """
import hashlib
from moezoo.core import signals
signals.EXIT_GRACE_S = 0.1
with signals.stop_on_signal(lambda: print("answered", flush=True), exits=True):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in ("ready\n", "answered\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


def test_other_threads_handle_no_signals() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_on_signal(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
