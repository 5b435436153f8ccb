"""Run lock: at most one process at a time trains a run.

`<run>/lock.json` exists while a process trains the run, and names that process. The lock itself is the operating
system's (flock), which ends with the process, however that ends. On a file system without such locks, the lock is held
while the process named in the file is alive; a process of another host counts as alive, because nothing here can tell.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from moezoo.core.errors import RunError
from moezoo.core.files import read_bounded
from moezoo.core.json_text import parse_json

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_MAX_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Fields:
        pid: process id on its host.
        host: host name.
        since: local time at which it took the lock, for the reader.
        process_start: start time of the process as its host counts it, which tells a reused pid apart.
        inode: of the lock file, which tells a copy of the run's folder apart.
    """

    pid: int
    host: str
    since: str
    process_start: str | None
    inode: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"

    @staticmethod
    def of_this_process(inode: int) -> "Holder":
        pid, now = os.getpid(), f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        return Holder(pid, platform.node(), now, process_start(pid), inode)

    def is_alive(self) -> bool:
        """Return whether the process may still run: on this host the same process does; on another host, always."""
        if self.host != platform.node():
            return True
        start = process_start(self.pid)
        return start is not None and self.process_start in (start, None)


class RunLock:
    """The lock of a run, held until `release`.

    Fields:
        left_by: the process that held the lock before and ended without releasing it, if any.
    """

    def __init__(self, path: Path):
        """Take the lock `path` (`<run>/lock.json`), in a folder that exists.

        Raises RunError: another process holds it, or the file cannot be written.
        """
        self._path = path
        try:
            self._descriptor, self.left_by = _take(path)
            try:
                os.ftruncate(self._descriptor, 0)
                _write(self._descriptor, Holder.of_this_process(os.fstat(self._descriptor).st_ino))
            except BaseException:
                self.release()
                raise
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise RunError(
                f"cannot lock the run: {path}: {reason}. Check the folder's permissions and free disk space."
            ) from None

    def check(self) -> None:
        """Raise RunError if the run's folder was moved or deleted, so that nothing is written beside the run."""
        if not _is_at(self._descriptor, self._path):
            folder = self._path.parent
            raise RunError(
                f"the run folder {folder} was moved or deleted while it was trained; expected {self._path.name} in it. "
                "Training stops, because nothing more can be saved. Move the folder back, and continue with --resume."
            )

    def release(self) -> None:
        """Remove the lock."""
        try:
            with contextlib.suppress(OSError):
                if _is_at(self._descriptor, self._path):
                    os.unlink(self._path)
        finally:
            os.close(self._descriptor)


def read_holder(path: Path) -> Holder | None:
    """Return the process that a lock file names; None if there is no such file, or it names none."""
    try:
        holder = Holder(**parse_json(read_bounded(path, _MAX_BYTES)))
        is_copy = holder.inode != path.stat().st_ino
    except (OSError, ValueError, TypeError):
        return None
    kinds = ((holder.pid, int), (holder.host, str), (holder.since, str), (holder.process_start, str | None))
    is_valid = all(isinstance(value, kind) for value, kind in kinds) and holder.pid > 0
    return holder if is_valid and not is_copy else None


def check_unlocked(path: Path) -> None:
    """Raise RunError if a lock file names a process that may be alive. The lock is not taken."""
    holder = read_holder(path)
    if holder is not None and holder.is_alive():
        raise _held(path, holder, "")


def process_start(pid: int) -> str | None:
    """Return the start time of a process of this host, in the units of its system; None if there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        state, *fields = stat.rpartition(")")[2].split()  # the name before it may contain spaces and parentheses
        return None if state in "ZX" else f"{fields[18]} ticks after boot"
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listed.stdout.strip() or None


def _take(path: Path) -> tuple[int, Holder | None]:
    """Lock the file; return its descriptor, and the process that left it behind. Raises RunError or OSError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor, read_holder(path)
            os.close(descriptor)  # its holder removed the file between the two calls
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise _held(path, read_holder(path), "") from None
            if isinstance(error, OSError) and error.errno in _UNSUPPORTED:
                return _take_without_flock(path)
            raise


def _take_without_flock(path: Path) -> tuple[int, Holder | None]:
    """Replace a lock file whose holder is not alive. Of two processes that do so at once, `check` stops the first."""
    previous = read_holder(path)
    if previous is not None and previous.is_alive():
        raise _held(path, previous, f" If that process has ended, delete {path}.")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), previous


def _write(descriptor: int, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).encode() + b"\n"
    if os.pwrite(descriptor, text, 0) != len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _held(path: Path, holder: Holder | None, more: str) -> RunError:
    here = holder is not None and holder.host == platform.node()
    stop = f"stop it with `kill {holder.pid}`, which saves" if holder is not None and here else "stop it"
    return RunError(
        f"{path.parent} is being trained by {holder or 'another process'}; expected one process per run. Wait for it, "
        f"{stop}, or choose another folder with --out.{more}"
    )
