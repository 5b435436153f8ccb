"""Files that a config's source names, local or remote, and their text in pieces that fit into memory.

Everything that goes wrong here is a DataError that names the file, and the place in it.
"""

import codecs
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moezoo.core.errors import DataError

CHUNK_BYTES = 1 << 20  # read at once; encoding a chunk takes up to 64 times as much memory, as measured


@dataclass(frozen=True)
class SourceFile:
    """One file. `stamp` changes with its content, as far as its file system tells: local files' mtime in ns."""

    name: str
    size: int | None  # bytes; None where a server does not say
    stamp: str
    filesystem: Any = field(default=None, compare=False, repr=False)  # fsspec's, None for a local file

    def open(self) -> BinaryIO:
        """Open for reading from the start."""
        if self.filesystem is None:
            return open(self.name, "rb")
        # Trap: without ranges, a web server can only be read as a stream, which fsspec does for block size 0.
        web = "http" in str(self.filesystem.protocol)
        remote: BinaryIO = self.filesystem.open(self.name, "rb", **({"block_size": 0} if web else {}))
        return remote

    def chunks(self) -> Iterator[bytes]:
        """The bytes, `CHUNK_BYTES` at a time. Raises DataError where reading fails."""
        try:
            with self.open() as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except Exception as error:  # OSError from a disk; from a remote file system whatever its client raises
            raise _unreadable(self.name, error) from error


def find_files(path: str, suffixes: tuple[str, ...], where: str) -> tuple[SourceFile, ...]:
    """The files of a path, sorted by name: a file, all below a folder, a glob, or a URL of these.

    Of a folder, the files that end in one of `suffixes` are meant (`.txt`). `where` names the config's key in
    errors. Raises DataError where there is none.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    return _find_remote(path, suffixes, where) if "://" in path else _find_local(path, suffixes, where)


def text_of(file: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """The text of a file in pieces, cut between characters, newlines as they are.

    `on_bytes` is called with the number of bytes of each chunk. Raises DataError where the file is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    for chunk in file.chunks():
        yield _decode(decoder, chunk, file, position)
        position += len(chunk)
        on_bytes(len(chunk))
    yield _decode(decoder, b"", file, position, final=True)


def documents_of(file: SourceFile, key: str, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """The text under `key` of each line of a JSONL file; empty lines and empty texts are left out.

    Raises DataError with the line's number: not UTF-8, not a JSON object, no such key, not a text.
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
            f"line is not JSON; got {line[:40]!r} ({error}); expected one object a line; {where}. Mend the file."
        ) from None
    if not isinstance(value, dict) or key not in value:
        got = f"the keys {sorted(value)}" if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"line has no field {key!r}; got {got}; expected an object with the text; {where}. "
            "Name the text's field in the source: {kind: jsonl, path: ..., field: NAME}."
        )
    text = value[key]
    if not isinstance(text, str):
        raise DataError(
            f"field {key!r} is not a text; got {type(text).__name__}; expected a string; {where}. "
            "Mend the file, or name another field."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has half of a surrogate pair; got {text[error.start]!r} at character {error.start}; expected "
            f"Unicode text; {where}. Mend the file."
        ) from None
    return text


def _lines(file: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """Lines without their newline; one that spans chunks is joined once."""
    begun: list[bytes] = []
    for chunk in file.chunks():
        first, *others = chunk.split(b"\n")
        begun.append(first)
        for other in others:
            yield b"".join(begun)
            begun = [other]
        on_bytes(len(chunk))
    yield b"".join(begun)


def _decode(
    decoder: codecs.IncrementalDecoder, chunk: bytes, file: SourceFile, position: int, final: bool = False
) -> str:
    """`position` is the chunk's place in the file; bytes of a character begun earlier are in the decoder."""
    held = decoder.getstate()[0]
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        offset = position - len(held) + error.start
        raise DataError(
            f"not UTF-8; got byte 0x{error.object[error.start]:02x} at byte offset {offset} ({error.reason}); "
            f"expected UTF-8 text; {file.name}. Convert it, for example with iconv -f latin1 -t utf-8."
        ) from None


def _find_local(path: str, suffixes: tuple[str, ...], where: str) -> tuple[SourceFile, ...]:
    place = Path(path).expanduser()
    try:
        if place.is_file():
            found = [place]
        elif place.is_dir():
            found = [file for file in place.rglob("*") if file.name.endswith(suffixes) and file.is_file()]
        elif glob.has_magic(path):
            found = [Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file()]
        else:
            raise DataError(
                f"no such file; got {path}; expected a file, a folder, a glob or a URL; {where}. Check the path, "
                "which is relative to the folder you work in."
            )
        files = [file.absolute() for file in sorted(found)]
        stats = [file.stat() for file in files]
    except OSError as error:
        raise _unreadable(path, error) from error
    if not files:
        what = f"{_patterns(suffixes)} below the folder" if place.is_dir() else "file matches the glob"
        raise DataError(f"no {what}; got {path}; expected at least one file; {where}. Check the path.")
    return tuple(
        SourceFile(str(file), stat.st_size, str(stat.st_mtime_ns)) for file, stat in zip(files, stats, strict=True)
    )


# What file systems call the fields of a file's description that change with its content.
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
            f"{protocol}:// is not a protocol that fsspec knows; got {path} ({error}); {where}. Check the URL."
        ) from None
    try:
        if "*" in inner or "[" in inner:
            names = [name for name in filesystem.glob(inner) if filesystem.isfile(name)]
        elif filesystem.isfile(inner):
            names = [inner]
        else:
            names = [name for name in filesystem.find(inner) if name.endswith(suffixes)]
        infos = [filesystem.info(name) for name in sorted(names)]
    except Exception as error:  # whatever the client of that file system raises
        raise _unreadable(f"{path} ({where})", error) from error
    if not infos:
        raise DataError(
            f"nothing is there; got {path}{_reason(filesystem, inner)}; expected a file, a glob, or a folder with "
            f"{_patterns(suffixes)}; {where}. Check the URL, and the connection."
        )
    return tuple(
        SourceFile(name, info.get("size"), _stamp(protocol, info), filesystem)
        for name, info in zip(sorted(names), infos, strict=True)
    )


def _reason(filesystem: Any, name: str) -> str:
    """Why there is no such file, where the file system says more than that."""
    try:
        filesystem.info(name)
    except Exception as error:  # whatever its client raises; fsspec puts FileNotFoundError on top of it
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
