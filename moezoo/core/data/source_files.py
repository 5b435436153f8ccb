"""Files of a data source, local or remote, and chunked reading of their text.

Every error is a DataError that names the file and the position in it.
"""

import codecs
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moezoo.core.errors import DataError
from moezoo.core.files import open_regular

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
        """Yield the content in chunks of `CHUNK_BYTES`. Raises DataError if reading fails."""
        try:
            with self.open() as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except Exception as error:  # OSError from a disk; any exception from the client of a remote file system
            raise _unreadable(self.name, error) from error


def find_files(path: str, suffixes: tuple[str, ...], where: str) -> tuple[SourceFile, ...]:
    """Find the files of a path, sorted by name: a file, a folder (recursively), a glob, or a URL of any of these.

    Of a folder, only files that end in one of `suffixes` (`.txt`) are returned. `where` names the config key in
    errors. Raises DataError if there are no files.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    return _find_remote(path, suffixes, where) if "://" in path else _find_local(path, suffixes, where)


def text_of(file: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """Yield the text of a file in pieces, split between characters; newlines are unchanged.

    `on_bytes` is called with the number of bytes of each chunk. Raises DataError if the file is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    for chunk in file.chunks():
        yield _decode(decoder, chunk, file, position)
        position += len(chunk)
        on_bytes(len(chunk))
    yield _decode(decoder, b"", file, position, final=True)


def documents_of(file: SourceFile, key: str, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """Yield the text under `key` of each line of a JSONL file; empty lines and empty texts are skipped.

    Raises DataError with the line number: not UTF-8, not a JSON object, no such key, not a text.
    """
    position = 0
    for number, line in enumerate(_lines(file, on_bytes), start=1):
        text = _decode(codecs.getincrementaldecoder("utf-8")(), line, file, position, final=True)
        position += len(line) + 1
        text = text.removeprefix("\ufeff").strip()
        document = _document(text, key, f"{file.name}, line {number}") if text else ""
        if document:
            yield document


def _document(line: str, key: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"line is not JSON; got {line[:40]!r} ({error}); expected one object per line; {where}. Fix the file."
        ) from None
    if not isinstance(value, dict) or key not in value:
        got = f"the keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"line has no field {key!r}; got {got}; expected an object with the text; {where}. "
            "Set the field of the text in the source: {kind: jsonl, path: ..., field: NAME}."
        )
    text = value[key]
    if not isinstance(text, str):
        raise DataError(
            f"field {key!r} is not a text; got {type(text).__name__}; expected a string; {where}. "
            "Fix the file, or use another field."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has half of a surrogate pair; got {text[error.start]!r} at character {error.start}; expected "
            f"Unicode text; {where}. Fix the file."
        ) from None
    return text


def _lines(file: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Yield lines without newlines; a line that spans chunks is joined once."""
    parts: list[bytes] = []
    for chunk in file.chunks():
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
        on_bytes(len(chunk))
    yield b"".join(parts)


def _decode(
    decoder: codecs.IncrementalDecoder, chunk: bytes, file: SourceFile, position: int, final: bool = False
) -> str:
    """Decode a chunk at byte `position` of the file; the decoder holds the bytes of an incomplete character."""
    held = decoder.getstate()[0]
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        offset = position - len(held) + error.start
        raise DataError(
            f"not UTF-8; got byte 0x{error.object[error.start]:02x} at byte offset {offset} ({error.reason}); "
            f"expected UTF-8 text; {file.name}. Convert it, e.g. with iconv -f latin1 -t utf-8."
        ) from None


def _find_local(path: str, suffixes: tuple[str, ...], where: str) -> tuple[SourceFile, ...]:
    local = Path(path).expanduser()
    try:
        if local.is_file():
            found = [local]
        elif local.is_dir():
            found = [file for file in local.rglob("*") if file.name.endswith(suffixes) and file.is_file()]
        elif glob.has_magic(path):
            found = [Path(name) for name in glob.glob(str(local), recursive=True) if Path(name).is_file()]
        else:
            raise DataError(
                f"no such file; got {path}; expected a file, a folder, a glob or a URL; {where}. Check the path, "
                "which is relative to the current working directory."
            )
        files = [file.absolute() for file in sorted(found)]
        stats = [file.stat() for file in files]
    except OSError as error:
        raise _unreadable(path, error) from error
    if not files:
        what = f"{_patterns(suffixes)} in the folder" if local.is_dir() else "file matches the glob"
        raise DataError(f"no {what}; got {path}; expected at least one file; {where}. Check the path.")
    return tuple(
        SourceFile(str(file), stat.st_size, str(stat.st_mtime_ns)) for file, stat in zip(files, stats, strict=True)
    )


# Fields of a file's description that change with its content, in different file systems.
_STAMPS = {"mtime", "etag", "lastmodified", "modified", "created", "generation", "md5hash", "contentmd5", "sha256"}


def _find_remote(path: str, suffixes: tuple[str, ...], where: str) -> tuple[SourceFile, ...]:
    import fsspec

    protocol = path.split("://")[0].split("::")[-1]
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise DataError(
            f"{protocol}:// needs a package that is not installed; got {path} ({error}); {where}. Install it, or "
            "copy the files to a local folder."
        ) from None
    except ValueError as error:
        raise DataError(
            f"{protocol}:// is not a protocol supported by fsspec; got {path} ({error}); {where}. Check the URL."
        ) from None
    try:
        if "*" in inner or "[" in inner:
            names = [name for name in filesystem.glob(inner) if filesystem.isfile(name)]
        elif filesystem.isfile(inner):
            names = [inner]
        else:
            names = [name for name in filesystem.find(inner) if name.endswith(suffixes)]
        infos = [filesystem.info(name) for name in sorted(names)]
    except Exception as error:  # any exception of the file system's client
        raise _unreadable(f"{path} ({where})", error) from error
    if not infos:
        raise DataError(
            f"no files found; got {path}{_reason(filesystem, inner)}; expected a file, a glob, or a folder with "
            f"{_patterns(suffixes)}; {where}. Check the URL, and the connection."
        )
    return tuple(
        SourceFile(name, info.get("size"), _stamp(protocol, info), filesystem)
        for name, info in zip(sorted(names), infos, strict=True)
    )


def _reason(filesystem: Any, name: str) -> str:
    """Return why the file was not found, if the file system has a reason."""
    try:
        filesystem.info(name)
    except Exception as error:  # fsspec wraps exceptions of the client in FileNotFoundError
        cause = error.__cause__ or error
        return f" ({type(cause).__name__}: {' '.join(str(cause).split())})"
    return ""


def _stamp(protocol: str, info: dict[str, Any]) -> str:
    known = {name.lower().replace("_", "").replace("-", ""): value for name, value in info.items()}
    return "; ".join([protocol, *(f"{name}={known[name]}" for name in sorted(_STAMPS & set(known)))])


def _patterns(suffixes: tuple[str, ...]) -> str:
    return " or ".join(f"*{suffix}" for suffix in suffixes)


def _unreadable(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"cannot be read; got {name} ({type(error).__name__}: {reason}); expected a readable file. Check its "
        "permissions, or the connection if it is a URL."
    )
