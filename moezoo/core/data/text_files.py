"""Text and JSON lines of a source's files, read in chunks.

Every error is a DataError that names the file and the position in it.
"""

import codecs
import json
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from moezoo.core.data.source_files import BIN_MAGIC, JSON_LINES, SourceFile
from moezoo.core.errors import DataError, shortened

_FIRST_LOOK = 4096  # bytes
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
    for where, value in objects_of(file, on_bytes):
        if key not in value:
            raise DataError(
                f"line has no field {key!r:.80}; got the keys {sorted(value)!s:.200}; expected an object with the "
                f"text; {where}. Set the field of the text in the source: {{kind: jsonl, path: ..., field: NAME}}."
            )
        if document := text_in(value, key, where):
            yield document


def objects_of(file: SourceFile, on_bytes: Callable[[int], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the object of each line of a JSONL file, after its place for errors; empty lines are skipped.

    Raises DataError with the line number: not UTF-8, not a JSON object.
    """
    position = 0
    for number, line in enumerate(_lines(file, on_bytes), start=1):
        if number == 1:
            _check_format(line, file.name, is_lines=True)
        text = _decode(codecs.getincrementaldecoder("utf-8")(), line, file, position, final=True)
        position += len(line) + 1
        text = text.removeprefix(_BYTE_ORDER_MARK).strip()
        where = f"{shortened(file.name)}, line {number}"
        if text:
            yield where, _object(text, where)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"line is not JSON; got {line[:40]!r} ({error}); expected one object per line; {where}. Fix the file."
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            f"line is no JSON object; got {type(value).__name__}; expected an object with fields; {where}. Fix the "
            "file."
        )
    return value


def text_in(value: dict[str, Any], key: str, where: str) -> str:
    """Return the text under a key of a line. Raises DataError: not a text, or half of a surrogate pair."""
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
