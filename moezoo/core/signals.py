"""Signals that ask a process to save and stop, answered at once even while a framework computes."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

URGENT = (signal.SIGINT, signal.SIGTERM)
"""Signals of which a second one ends the process at once."""

# A closed terminal (sent twice: by the kernel and by the shell), warnings of a scheduler before it ends a job, and the
# limit of CPU time (sent every second from then on). They only ever ask.
_ASKING = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")

EXIT_GRACE_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal asks the process to end at once.

    Fields:
        exit_status: 128 plus the number of the signal, as shells report it.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


def stop_signals() -> list[int]:
    """Return the signals that ask to stop. One that the process was started to ignore (nohup) is not among them."""
    asking = [int(getattr(signal, name)) for name in _ASKING if hasattr(signal, name)]
    kept = (signal.SIG_IGN, None)  # None: a handler that Python does not know and could not restore
    return [*URGENT, *(number for number in asking if signal.getsignal(number) not in kept)]


@contextmanager
def handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install a handler for the stop signals in a block; the handlers before it are restored after it."""
    previous = {number: signal.signal(number, handle) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_on_signal(on_stop: Callable[[], None], *, exits: bool = False) -> Iterator[threading.Event]:
    """Yield an event that a stop signal sets; the block is expected to save its work and end.

    A second SIGINT or SIGTERM raises Interrupted as soon as Python code runs. Outside of the main thread no signal is
    handled.

    Args:
        on_stop: called once, in another thread, as soon as the first signal arrives.
        exits: end the process EXIT_GRACE_S after the second signal if the block has not ended by then, because it
            computes outside of Python.
    """
    stop, ended, urgent = threading.Event(), threading.Event(), 0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: object) -> None:
        nonlocal urgent
        urgent += number in URGENT
        stop.set()
        if urgent == 2 and number in URGENT:  # not at a third, which would interrupt the cleanup
            raise Interrupted(number)

    # Trap: a handler runs in the main thread between two instructions, so not while that one compiles or waits for the
    # device. The signal's number arrives at this socket all the same.
    arrived, sent = socket.socketpair()
    sent.setblocking(False)
    handled = stop_signals()
    answering = threading.Thread(
        target=_answer, args=(arrived, handled, stop, on_stop, ended if exits else None), daemon=True
    )
    answering.start()
    before = signal.set_wakeup_fd(sent.fileno(), warn_on_full_buffer=False)
    try:
        with handled_by(handle):
            yield stop
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        sent.close()
        answering.join()
        arrived.close()


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Raise Interrupted in the block at a stop signal; of those that only ask, at the first one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = False

    def handle(number: int, frame: object) -> None:
        nonlocal stopped
        first, stopped = not stopped, True
        if first or number in URGENT:
            raise Interrupted(number)

    with handled_by(handle):
        yield


def _answer(
    arrived: socket.socket,
    handled: list[int],
    stop: threading.Event,
    on_stop: Callable[[], None],
    ended: threading.Event | None,
) -> None:
    """Answer signals until the socket is closed; with `ended`, end the process if it outlasts a second one."""
    signals = urgent = 0
    while numbers := arrived.recv(64):
        for number in numbers:
            signals += number in handled
            urgent += number in URGENT
            if number in handled and signals == 1:
                stop.set()
                on_stop()
            if ended is not None and urgent == 2 and not ended.wait(EXIT_GRACE_S):
                end_process(128 + number)


def end_process(status: int) -> None:
    """End this process without any cleanup, except that a terminal's cursor is shown again."""
    try:
        os.write(2, b"\x1b[?25h\ninterrupted\n" if os.isatty(2) else b"interrupted\n")
    finally:
        os._exit(status)
