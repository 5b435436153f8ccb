"""Files of a data source, local or remote, and chunked reading of them.

Every error is a DataError that names the file.
"""

import fnmatch
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moezoo.core.errors import DataError, shortened
from moezoo.core.files import located, open_regular, reason_of

JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of JSON lines, in lower case."""

BIN_MAGIC = 20240520
"""First int32 of a token shard in modded-nanogpt's format."""

CHUNK_BYTES = 1 << 20  # encoding a chunk takes up to 64 times as much memory, as measured


@dataclass(frozen=True)
class SourceFile:
    """One file. `stamp` changes with its content, if the file system tracks that: mtime in ns for local files."""

    name: str
    size: int | None  # bytes; None if a server does not report it
    stamp: str
    filesystem: Any = field(default=None, compare=False, repr=False)  # of fsspec; None for a local file

    def open(self) -> BinaryIO:
        """Open the file for reading."""
        if self.filesystem is None:
            return open_regular(self.name)
        # Trap: a web server without range requests can only be streamed, which fsspec does for block size 0.
        web = "http" in str(self.filesystem.protocol)
        remote: BinaryIO = self.filesystem.open(self.name, "rb", **({"block_size": 0} if web else {}))
        return remote

    def chunks(self) -> Iterator[bytes]:
        """Yield the content in chunks of `CHUNK_BYTES`. Raises DataError if reading fails, or the file was changed."""
        try:
            with self.open() as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
                now = None if self.filesystem is not None else os.fstat(file.fileno())
        except Exception as error:  # OSError from a disk; any exception from the client of a remote file system
            raise _unreadable(shortened(self.name), error) from error
        if now is not None and (now.st_size, str(now.st_mtime_ns)) != (self.size, self.stamp):
            raise DataError(
                f"file was changed while it was read; got {now.st_size} bytes; expected the {self.size} bytes found at "
                f"the start; {shortened(self.name)}. Start again when no process writes to it."
            )


def find_files(path: str, suffixes: tuple[str, ...], where: str) -> tuple[SourceFile, ...]:
    """Find the files of a path, sorted by name: a file, a folder (recursively), a glob, or a URL of any of these.

    Of a folder, only files that end in one of `suffixes` (`.txt`, in any case) and are not hidden (`.a.txt`) are
    returned. Links are followed, and a file is returned once. `where` names the config key in errors. Raises DataError
    if there are no files.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if not path.strip():
        raise DataError(
            f"path is empty; got {path!r}; expected a file, a folder, a glob or a URL; {where}. Write '.' for the "
            "current working directory."
        )
    return _find_remote(path, suffixes, where) if "://" in path else _find_local(path, suffixes, where)


def find_texts(path: str, where: str) -> tuple[SourceFile, ...]:
    """Find the files of a path as `find_files` does for `.txt`. Raises DataError also if one of them is JSON lines."""
    files = find_files(path, (".txt",), where)
    lines = next((file.name for file in files if suffix_of(file.name) in JSON_LINES), None)
    if lines is not None:
        raise DataError(
            f"file is JSON lines, which would be read as text with all of its syntax; got {shortened(lines)}; "
            f"expected plain text; {where}. Use a source {{kind: jsonl, path: ..., field: text}}."
        )
    return files


def suffix_of(path: str | Path) -> str:
    """Return the suffix of a path or URL in lower case: `.txt` of `A.TXT` and of `https://host/a.txt?download=1`."""
    name = str(path)
    return Path(name.partition("?")[0] if name.startswith(("http://", "https://")) else name).suffix.lower()


def _find_local(path: str, suffixes: tuple[str, ...], where: str) -> tuple[SourceFile, ...]:
    local = Path(path).expanduser()
    try:
        if local.is_file():
            found = [local]
        elif local.is_dir():
            found = [file for file in _files_below(local) if suffix_of(file) in suffixes]
        elif glob.has_magic(path):
            found = list(_glob(local))
        else:
            problem = "not a regular file" if local.exists() else "no such file"
            raise DataError(
                f"{problem}; got {located(path)}; expected a file, a folder, a glob or a URL; {where}. Check the "
                "path; a relative one begins at the working folder."
            )
        once = {os.path.realpath(file): file for file in sorted(found, reverse=True)}  # several links to one file
        files = [file.absolute() for file in sorted(once.values())]
        stats = [file.stat() for file in files]
    except OSError as error:
        raise _unreadable(shortened(path), error) from error
    if not files:
        what = f"{_patterns(suffixes)} in the folder" if local.is_dir() else "file matches the glob"
        others = sorted({file.name.partition(".")[2] for file in _files_below(local)}) if local.is_dir() else []
        has = f" (it has *.{', *.'.join(others[:5])})" if others else ""
        raise DataError(f"no {what}; got {located(path)}{has}; expected at least one file; {where}. Check the path.")
    return tuple(
        SourceFile(str(file), stat.st_size, str(stat.st_mtime_ns)) for file, stat in zip(files, stats, strict=True)
    )


def _glob(pattern: Path) -> Iterator[Path]:
    """Yield the files that match a pattern. Trap: `glob` follows links in circles, 40 folders deep, for `**`."""
    parts = pattern.parts
    if "**" not in parts:
        yield from (file for name in glob.glob(str(pattern)) if (file := Path(name)).is_file())
        return
    first = parts.index("**")
    for folder in glob.glob(str(Path(*parts[:first]))):
        for file in _files_below(Path(folder)):
            if _matches(file.relative_to(folder).parts, parts[first:]):
                yield file


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or not names:
        return pattern == names
    if pattern[0] == "**":
        rest = pattern[1:] or ("*",)
        return any(_matches(names[skip:], rest) for skip in range(len(names)))
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, but no hidden files and folders. Links are followed, to each folder once."""
    seen = {os.path.realpath(folder)}
    for here, folders, files in os.walk(folder, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        folders.clear()
        for name in visible:
            real = os.path.realpath(os.path.join(here, name))
            if real not in seen:  # a link to a folder above would lead in circles
                seen.add(real)
                folders.append(name)
        yield from (file for name in files if not name.startswith(".") and (file := Path(here, name)).is_file())


# Fields of a file's description that change with its content, in different file systems.
_STAMPS = {"mtime", "etag", "lastmodified", "modified", "created", "generation", "md5hash", "contentmd5", "sha256"}


def _find_remote(path: str, suffixes: tuple[str, ...], where: str) -> tuple[SourceFile, ...]:
    import fsspec

    protocol = path.split("://")[0].split("::")[-1]
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise DataError(
            f"{protocol}:// needs a package that is not installed; got {shortened(path)} ({error}); {where}. Install "
            "it, or copy the files to a local folder."
        ) from None
    except ValueError as error:
        raise DataError(
            f"{protocol}:// is not a protocol supported by fsspec; got {shortened(path)} ({reason_of(error)}); "
            f"{where}. Check the URL."
        ) from None
    try:
        if "*" in inner or "[" in inner:
            names = [name for name in filesystem.glob(inner) if filesystem.isfile(name)]
        elif filesystem.isfile(inner):
            names = [inner]
        else:
            names = [
                name for name in filesystem.find(inner) if suffix_of(name) in suffixes and not _is_hidden(name, inner)
            ]
        infos = [filesystem.info(name) for name in sorted(names)]
    except Exception as error:  # any exception of the file system's client
        raise _unreadable(f"{shortened(path)} ({where})", error) from error
    if not infos:
        raise DataError(
            f"no files found; got {shortened(path)}{_reason(filesystem, inner)}; expected a file, a glob, or a folder "
            f"with {_patterns(suffixes)}; {where}. Check the URL, and the connection."
        )
    return tuple(
        SourceFile(name, info.get("size"), _stamp(protocol, info), filesystem)
        for name, info in zip(sorted(names), infos, strict=True)
    )


def _is_hidden(name: str, folder: str) -> bool:
    """Return whether a file, or a folder on the way to it from `folder`, has a name that begins with a period."""
    return any(part.startswith(".") for part in name.removeprefix(folder).split("/"))


def _reason(filesystem: Any, name: str) -> str:
    """Return why the file was not found, if the file system has a reason."""
    try:
        filesystem.info(name)
    except Exception as error:  # fsspec wraps exceptions of the client in FileNotFoundError
        cause = error.__cause__ or error
        return f" ({type(cause).__name__}: {reason_of(cause)})"
    return ""


def _stamp(protocol: str, info: dict[str, Any]) -> str:
    known = {name.lower().replace("_", "").replace("-", ""): value for name, value in info.items()}
    return "; ".join([protocol, *(f"{name}={known[name]}" for name in sorted(_STAMPS & set(known)))])


def _patterns(suffixes: tuple[str, ...]) -> str:
    return " or ".join(f"*{suffix}" for suffix in suffixes)


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(
        f"cannot be read; got {name} ({type(error).__name__}: {reason_of(error)}); expected a readable file. Check its "
        "permissions, or the connection if it is a URL."
    )
