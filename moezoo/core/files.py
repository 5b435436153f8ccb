"""The one place that writes files, so that a kill at any moment leaves the old file or the new one, whole.

Also the folder operations that checkpoints are made of. Every failure of the operating system becomes a
RunError that names the path.
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
"""Folder of the package; `configs` and `datasets` are in it, in a checkout as links."""


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path`: all of it or nothing, and durably; see `written_atomically`."""
    with written_atomically(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def written_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write and seek in, which becomes `path` when the block ends without an error: whole, and durably.

    A temporary file in the same folder is written, flushed to the disk and renamed over `path`, then the
    folder is flushed. A kill leaves at most a hidden `.NAME.*.partial` beside an untouched `path`. The folder
    must exist. The file gets the usual permissions (0666 less the umask).

    Raises RunError where the folder is missing or not writable, `path` is a folder, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    with _explained(f"cannot write {path}"):
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
        _flush_folder(path.parent)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content as 64 lower-case hexadecimal digits; RunError where it cannot be read."""
    with _explained(f"cannot read {path}"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably; one that exists is fine."""
    with _explained(f"cannot make the folder {path}"):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _flush_folder(folder.parent)


def rename_folder(source: Path, target: Path) -> None:
    """Rename a whole folder in one step, durably. `target` lies in the same folder and must not exist."""
    with _explained(f"cannot rename {source} to {target.name}"):
        if target.exists():  # Trap: rename(2) silently replaces an empty folder
            raise FileExistsError(17, "the target exists")
        os.rename(source, target)
        _flush_folder(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; a link is removed, not followed. One that is missing is fine."""
    with _explained(f"cannot remove {path}"):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def flush_folder(path: Path) -> None:
    """Flush a folder's list of names to the disk, so that a rename in it survives a power cut."""
    with _explained(f"cannot flush the folder {path}"):
        _flush_folder(path)


def flush_tree(path: Path) -> list[Path]:
    """Flush all files below a folder, and the folders, to the disk; the files, in the order of their names."""
    found = []
    with _explained(f"cannot flush what is in {path}"):
        for folder, _, names in os.walk(path):
            for name in names:
                found.append(Path(folder) / name)
                _flush(found[-1], os.O_RDWR)
            _flush_folder(Path(folder))
    return sorted(found)


def _flush_folder(path: Path) -> None:
    _flush(path, os.O_RDONLY | os.O_DIRECTORY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{what}: {error.filename or 'a part of the path'} does not exist. Make it first.") from error
    except PermissionError as error:
        raise RunError(f"{what}: permission denied. Choose another place, or change its permissions.") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunError(f"{what}: {reason}. Free the place or choose another one.") from error
