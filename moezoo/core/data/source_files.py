"""Files of a data source, local or remote, and chunked reading of their text.

Every error is a DataError that names the file and the position in it.
"""

import codecs
import fnmatch
import glob
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moezoo.core.errors import DataError, shortened
from moezoo.core.files import located, open_regular, reason_of

JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of JSON lines, in lower case."""

BIN_MAGIC = 20240520
"""First int32 of a token shard in modded-nanogpt's format."""

_FIRST_LOOK = 4096  # bytes
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


_BYTE_ORDER_MARK = "\ufeff"
_LINE_BYTES = 256 << 20  # of a JSON line: it is parsed whole

# First bytes of files that are not UTF-8 text, and how to make text of them: FILE is the file, OUT the text.
_UTF_16 = "is UTF-16 text", "Convert it: iconv -f UTF-16 -t UTF-8 FILE > OUT"
_UTF_32 = "is UTF-32 text", "Convert it: iconv -f UTF-32 -t UTF-8 FILE > OUT"
_BZIP2 = "is compressed with bzip2", "Decompress it: bunzip2 -c FILE > OUT"
_FORMATS = {
    b"\x1f\x8b": ("is compressed with gzip", "Decompress it: gunzip -c FILE > OUT"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "Decompress it: zstd -dc FILE > OUT"),
    **{b"BZh%d1AY&SY" % level: _BZIP2 for level in range(1, 10)},
    b"\xfd7zXZ\x00": ("is compressed with xz", "Decompress it: xz -dc FILE > OUT"),
    b"PK\x03\x04": ("is a zip archive", "Unpack it: unzip FILE"),
    b"PAR1\x15": ("is a Parquet table", "Write its text column as JSON lines, e.g. with pandas.DataFrame.to_json"),
    b"\x93NUMPY": ("is a NumPy array", "Use it as token ids: {kind: tokens, path: FILE}; its name must end in .npy"),
    BIN_MAGIC.to_bytes(4, "little"): (
        "has token ids in modded-nanogpt's format",
        "Use it as token ids: {kind: tokens, path: FILE}; its name must end in .bin",
    ),
    b"\xff\xfe\x00\x00": _UTF_32,
    b"\x00\x00\xfe\xff": _UTF_32,
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
}


def _check_format(first: bytes, name: str, is_lines: bool = False) -> None:
    """Raise DataError if a file that begins with these bytes is not UTF-8 text, but in another known format."""
    known = next((found for mark, found in _FORMATS.items() if first.startswith(mark)), None) or _with_nuls(first)
    if known is not None:
        what, advice = known
        file = shlex.quote(name) if name == shortened(name) else "FILE"
        lines = is_lines or any(suffix in name.lower() for suffix in JSON_LINES)  # a.jsonl.gz
        words = {"FILE": file, "OUT": f"{file}.jsonl" if lines else f"{file}.txt"}
        advice = re.sub("FILE|OUT", lambda word: words[word[0]], advice)
        raise DataError(f"file {what}; got {shortened(name)}; expected UTF-8 text. {advice}.")


def _with_nuls(first: bytes) -> tuple[str, str] | None:
    """Return the format of a file by its many NUL bytes: UTF-16, whose high bytes are 0 for Latin letters, or none."""
    even, odd = first[:_FIRST_LOOK:2], first[1:_FIRST_LOOK:2]
    even_nul, odd_nul = (len(part) > 1 and 2 * part.count(0) > len(part) for part in (even, odd))
    if not even_nul and not odd_nul:
        return None
    if 2 * (even if odd_nul else odd).count(0) >= len(odd):
        return "has NUL bytes, so it is no text", "Use another file, or write it again"
    order = "LE" if odd_nul else "BE"
    return f"is UTF-16{order} text", f"Convert it: iconv -f UTF-16{order} -t UTF-8 FILE > OUT"


def text_of(file: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """Yield the text of a file in pieces, split between characters; newlines are unchanged.

    `on_bytes` is called with the number of bytes of each chunk. Raises DataError if the file is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, at_start = 0, True
    for chunk in file.chunks():
        if not position:
            _check_format(chunk, file.name)
        text = _decode(decoder, chunk, file, position)
        yield text.removeprefix(_BYTE_ORDER_MARK) if at_start else text
        at_start = at_start and not text
        position += len(chunk)
        on_bytes(len(chunk))
    yield _decode(decoder, b"", file, position, final=True)


def documents_of(file: SourceFile, key: str, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """Yield the text under `key` of each line of a JSONL file; empty lines and empty texts are skipped.

    Raises DataError with the line number: not UTF-8, not a JSON object, no such key, not a text.
    """
    position = 0
    for number, line in enumerate(_lines(file, on_bytes), start=1):
        if number == 1:
            _check_format(line, file.name, is_lines=True)
        text = _decode(codecs.getincrementaldecoder("utf-8")(), line, file, position, final=True)
        position += len(line) + 1
        text = text.removeprefix(_BYTE_ORDER_MARK).strip()
        document = _document(text, key, f"{shortened(file.name)}, line {number}") if text else ""
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
        got = f"the keys {sorted(value)!s:.200}" if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"line has no field {key!r:.80}; got {got}; expected an object with the text; {where}. "
            "Set the field of the text in the source: {kind: jsonl, path: ..., field: NAME}."
        )
    text = value[key]
    if not isinstance(text, str):
        raise DataError(
            f"field {key!r:.80} is not a text; got {type(text).__name__}; expected a string; {where}. "
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
    number = 1
    for chunk in file.chunks():
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
            number += 1
        if sum(map(len, parts)) > _LINE_BYTES:
            raise DataError(
                f"line is longer than {_LINE_BYTES >> 20} MiB; expected a JSON object per line; "
                f"{shortened(file.name)}, line {number}. "
                "Check that the file is JSON lines; write long texts as a source of kind text."
            )
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
            f"expected UTF-8 text; {shortened(file.name)}. Convert it, e.g. with iconv -f latin1 -t utf-8."
        ) from None


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
