"""A time limit for joining other processes, for frameworks that wait in native code."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STARTUP_S = 60
"""Default time to wait for all processes to connect."""

_WATCHDOG = """
import os, select, sys
parent, seconds, message = sys.argv[1:]
if not select.select([0], [], [], float(seconds))[0]:
    os.write(2, (message + "\\n").encode())
    os.kill(int(parent), 9)
"""


@contextmanager
def startup_limit(seconds: float, message: str) -> Iterator[None]:
    """Kill this process, after a line on stderr, if the block takes longer than `seconds`; Ctrl-C ends it at once.

    MLX waits for other processes while it holds the interpreter's lock, so that no thread and no signal handler of
    Python runs; JAX has a time limit, but aborts with a native stack. So another process keeps the time. It exits when
    its stdin is closed: at the end of the block, and when this process ends in any way.
    """
    watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHDOG, str(os.getpid()), str(seconds), message],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is not for it
    )
    # Only the main thread may set it, and a background job of a shell ignores it.
    in_main_thread = threading.current_thread() is threading.main_thread()
    changed = in_main_thread and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL) if changed else None
    try:
        yield
    finally:
        if changed:
            signal.signal(signal.SIGINT, previous)
        watchdog.communicate()
