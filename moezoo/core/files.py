"""Atomic, durable file writes and folder operations: after a crash, a path has the old content or the new one.

Checkpoints and caches are built on these. Every OSError becomes a RunError that names the path.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moezoo.core.errors import RunError

PACKAGE = Path(__file__).parents[1]
"""Folder of the package, which contains `configs` and `datasets` (symbolic links in a checkout)."""


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
    with _readable_errors(f"cannot write {path}"):
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
    with _readable_errors(f"cannot read {path}"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Create a folder and its parents, durably; it may already exist."""
    with _readable_errors(f"cannot create the folder {path}"):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _fsync_folder(folder.parent)


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder atomically and durably. `target` has the same parent folder and must not exist."""
    with _readable_errors(f"cannot rename {source} to {target.name}"):
        if target.exists():  # Trap: rename(2) silently replaces an empty folder
            raise FileExistsError(17, "the target exists")
        os.rename(source, target)
        _fsync_folder(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content, if it exists; a symbolic link is removed, not followed."""
    with _readable_errors(f"cannot remove {path}"):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def flush_folder(path: Path) -> None:
    """Sync a folder's directory entries to disk, so that a rename in it survives a power loss."""
    with _readable_errors(f"cannot flush the folder {path}"):
        _fsync_folder(path)


def flush_tree(path: Path) -> list[Path]:
    """Sync all files and folders of a tree to disk and return the files, sorted by name."""
    found = []
    with _readable_errors(f"cannot flush the files in {path}"):
        for folder, _, names in os.walk(path):
            for name in names:
                found.append(Path(folder) / name)
                _fsync(found[-1], os.O_RDWR)
            _fsync_folder(Path(folder))
    return sorted(found)


def _fsync_folder(path: Path) -> None:
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """Convert an OSError into a RunError of one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{what}: {error.filename or 'a part of the path'} does not exist. Create it first.") from error
    except PermissionError as error:
        raise RunError(f"{what}: permission denied. Use another folder, or change its permissions.") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        advice = "Remove what is in the way, free disk space, or use another folder."
        raise RunError(f"{what}: {reason}. {advice}") from error
