"""Reads of regular files only, and atomic, durable writes: after a crash, a path has the old content or the new one.

Checkpoints and caches are built on these. Writes convert every OSError to a RunError that names the path. Reads raise
an OSError for the caller to convert: only the caller knows what the file is for.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moezoo.core.errors import RunError, shortened

_PARTIAL = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.partial")

PACKAGE = Path(__file__).parents[1]
"""Folder of the package, which contains `configs` and `datasets` (symbolic links in a checkout)."""

_CHUNK_BYTES = 1 << 20  # a read allocates what it asks for
_LFS_POINTER, _LFS_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024


def open_regular(path: str | Path, max_bytes: int | None = None) -> io.FileIO:
    """Open a regular file for reading, unbuffered, without waiting for anything.

    Raises OSError (see `reason_of`): no such file, no permission, a folder, pipe, socket or device, which could block
    forever or never end, a file of more than `max_bytes` bytes, or a Git LFS pointer in place of the file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe blocks until its other end is opened.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except ValueError:
        raise OSError(errno.EINVAL, "its name has a NUL character", repr(path)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe" if stat.S_ISFIFO(status.st_mode) else "device"
        raise OSError(errno.EINVAL, f"it is a {kind}, not a regular file", str(path))
    if max_bytes is not None and status.st_size > max_bytes:
        os.close(descriptor)
        raise _too_large(path, status.st_size, max_bytes)
    if status.st_size <= _LFS_POINTER_BYTES and os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a Git LFS pointer: run `git lfs pull` in its folder to fetch it", str(path))
    return io.FileIO(descriptor, "rb")


def read_bounded(path: str | Path, max_bytes: int) -> bytes:
    """Read a whole small file; one of more than `max_bytes` bytes is refused unread. Raises as `open_regular`."""
    content = bytearray()
    with open_regular(path, max_bytes) as file:
        while len(content) <= max_bytes and (more := file.read(_CHUNK_BYTES)):
            content += more
    if len(content) > max_bytes:  # it grew, or is in /proc, where every file has size 0
        raise _too_large(path, len(content), max_bytes)
    return bytes(content)


def copy_file(source: Path, target: Path, max_bytes: int) -> None:
    """Copy a small regular file atomically. Raises RunError, also if it has more than `max_bytes`."""
    with readable_errors(f"cannot copy {source}"):
        content = read_bounded(source, max_bytes)
    write_atomically(target, content)


def located(path: str | Path) -> str:
    """Return a path for an error, shortened; one that is relative is followed by the absolute path that it means."""
    absolute = os.path.abspath(Path(path).expanduser())
    return shortened(path) if Path(path).is_absolute() else f"{shortened(path)} ({shortened(absolute)})"


def reason_of(error: BaseException) -> str:
    """Return the reason of an error of reading or decoding a file in one short line, without the path."""
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    return reason[:1].lower() + reason[1:] if reason else type(error).__name__


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path` atomically and durably; see `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[BinaryIO]:
    """Open a seekable file for writing that replaces `path` atomically when the block ends without an error.

    A temporary file in the same folder is written, synced to disk (fsync) and renamed over `path`, then the
    folder is synced. A crash leaves at most a hidden `.NAME.*.partial` and the old `path`. The folder
    must exist. The file has the default permissions (0666 minus the umask).

    Raises RunError if the folder is missing or not writable, `path` is a folder, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    with readable_errors(f"cannot write {path}"):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _fsync_folder(path.parent)


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in lower-case hexadecimal. Raises RunError if it cannot be read."""
    with readable_errors(f"cannot read {path}"), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Create a folder and its parents, durably; it may already exist."""
    with readable_errors(f"cannot create the folder {path}"):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _fsync_folder(folder.parent)


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder atomically and durably. `target` has the same parent folder and must not exist."""
    with readable_errors(f"cannot rename {source} to {target.name}"):
        if target.exists():  # Trap: rename(2) silently replaces an empty folder
            raise FileExistsError(17, "the target exists")
        os.rename(source, target)
        _fsync_folder(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content, or a file, if it exists; a symbolic link is removed, not followed."""
    with readable_errors(f"cannot remove {path}"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def remove_empty_folder(path: Path) -> None:
    """Remove a folder if it is empty; otherwise leave it."""
    with contextlib.suppress(OSError):
        path.rmdir()


@contextlib.contextmanager
def emptied_on_error(path: Path) -> Iterator[None]:
    """Remove what the block writes into a new or empty folder if it raises; other folders are left as they are."""
    existed = os.path.lexists(path)
    is_empty = not existed or (path.is_dir() and not any(path.iterdir()))
    try:
        yield
    except BaseException:
        if is_empty and path.is_dir():
            with contextlib.suppress(RunError):
                for entry in path.iterdir():
                    remove_folder(entry)
        if not existed:
            remove_empty_folder(path)
        raise


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left of `atomic_writer`; no other process may write there."""
    with readable_errors(f"cannot remove temporary files in {folder}"):
        for file in folder.glob(".*.partial"):
            if _PARTIAL.fullmatch(file.name):
                file.unlink()


def check_writable(path: Path) -> None:
    """Check that a folder can be written or, if it is missing, created. Nothing is changed. Raises RunError."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    with readable_errors(f"cannot create the folder {path}"):
        if not existing.is_dir():
            raise NotADirectoryError(20, f"{existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError


def flush_folder(path: Path) -> None:
    """Sync a folder's directory entries to disk, so that a rename in it survives a power loss."""
    with readable_errors(f"cannot flush the folder {path}"):
        _fsync_folder(path)


def flush_tree(path: Path) -> list[Path]:
    """Sync all files and folders of a tree to disk and return the files, sorted by name."""
    found = []
    with readable_errors(f"cannot flush the files in {path}"):
        for folder, _, names in os.walk(path):
            for name in names:
                found.append(Path(folder) / name)
                _fsync(found[-1], os.O_RDWR)
            _fsync_folder(Path(folder))
    return sorted(found)


def _too_large(path: str | Path, size: int, max_bytes: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {size} bytes, more than {max_bytes}", str(path))


def _fsync_folder(path: Path) -> None:
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def readable_errors(what: str) -> Iterator[None]:
    """Convert an OSError into a RunError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        # A temporary file in a missing folder is not what is missing.
        parent = Path(error.filename).parent if error.filename else None
        missing = parent if parent is not None and not parent.exists() else error.filename or "a part of the path"
        raise RunError(f"{what}: {missing} does not exist. Create it first.") from error
    except PermissionError as error:
        raise RunError(f"{what}: permission denied. Use another folder, or change its permissions.") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        advice = "Remove what is in the way, free disk space, or use another folder."
        raise RunError(f"{what}: {reason}. {advice}") from error
