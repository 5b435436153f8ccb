"""Cache of tokenized text on disk.

A cache entry is a folder of `.npy` shards, named by a hash of its inputs: the files (path, size, modification time),
the field of a JSONL source, and the tokenizer. It is written under a temporary name, synced and renamed, so that an
entry is either complete or missing.
"""

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moezoo.core.data.encode_text import encode_pieces
from moezoo.core.data.source_files import SourceFile, documents_of, text_of
from moezoo.core.data.token_shards import IdFile, Tokens, check_range, open_shard
from moezoo.core.data.tokenizers import Ids, Tokenizer, with_first_tokens
from moezoo.core.errors import DataError, RunError
from moezoo.core.files import flush_folder, make_folder, read_bounded, remove_folder, rename_folder, write_atomically
from moezoo.core.json_text import parse_json
from moezoo.core.progress import Progress

SHARD_TOKENS = 1 << 26
BETWEEN_DOCUMENTS = "\n\n"  # separator if the tokenizer has no end-of-text token


_FORMAT = 2  # of a cache entry: changes with the tokens that a text gets
_FIRST_LOOK = 1 << 16  # number of tokens per shard that are range-checked when it is opened
_MAX_JSON_BYTES = 100_000_000  # of a cache's small files
_STALE_S = 24 * 3600.0


# --- pre-tokenized shards --------------------------------------------------------------------------------------------


def open_shards(files: Sequence[SourceFile], vocab_size: int, name: str) -> Tokens:
    """Open `.npy` and `.bin` shards; remote files are copied into the cache first.

    Raises DataError: not a shard, damaged, empty, ids outside the vocabulary in the first 65536 of a shard (the
    others are checked when they are read).
    """
    shards = [open_shard(local_copy(file), file.name) for file in files]
    for shard, file in zip(shards, files, strict=True):
        with shard.opened() as read:
            check_range(read(0, min(_FIRST_LOOK, len(shard))), vocab_size, file.name)
    return Tokens(shards, vocab_size, name, known_in_range=False)


def local_copy(file: SourceFile) -> Path:
    """Return the path of a local file, or of the cached copy of a remote file, which is downloaded if needed."""
    if file.filesystem is None:
        return Path(file.name)
    copy = cache_folder() / f"{_digest([file])}{Path(file.name).suffix}"
    if not (copy.is_file() and copy.stat().st_size == file.size):
        with _writing_cache():
            make_folder(copy.parent)
            partial = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}.partial")
            try:
                with open(partial, "wb") as target:
                    for chunk in file.chunks():
                        target.write(chunk)
                    target.flush()
                    os.fsync(target.fileno())
                os.replace(partial, copy)
                flush_folder(copy.parent)
            finally:
                partial.unlink(missing_ok=True)
    return copy


# --- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Documents of one source: one per file, or one per line of JSONL files (`field` of each line)."""

    name: str  # for errors and progress
    files: tuple[SourceFile, ...]
    field: str | None = None

    def pieces(self, on_bytes: Callable[[int], None]) -> Iterator[str | None]:
        """Yield the text in pieces, with None between two documents; empty documents are left out.

        A piece is a part of a file, or all of a line of JSONL.
        """
        started = False
        for file in self.files:
            documents: Iterator[Iterator[str]]
            if self.field is None:
                documents = iter([text_of(file, on_bytes)])
            else:
                documents = (iter([text]) for text in documents_of(file, self.field, on_bytes))
            for document in documents:
                first = next((piece for piece in document if piece), None)
                if first is not None:
                    if started:
                        yield None
                    started = True
                    yield first
                    yield from document

    def counter(self, what: str, on_progress: Progress | None) -> Callable[[int], None]:
        """Return a function that counts bytes and reports progress."""
        sizes = [file.size for file in self.files]
        total = sum(size for size in sizes if size is not None) if None not in sizes else None
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            if on_progress is not None:
                on_progress(f"{what} {self.name}", done, total)

        return count


def characters_of(texts: Texts, on_progress: Progress | None = None) -> set[str]:
    """Return the set of characters of the texts, including the separator; computed in one pass and cached."""
    file = cache_folder() / f"{_digest(texts.files, texts.field)}.characters.json"
    with contextlib.suppress(OSError, ValueError):
        return set(str(parse_json(read_bounded(file, _MAX_JSON_BYTES))))
    characters: set[str] = set()
    for piece in texts.pieces(texts.counter("reading", on_progress)):
        characters.update(BETWEEN_DOCUMENTS if piece is None else piece)
    with _writing_cache():
        make_folder(file.parent)
        write_atomically(file, json.dumps("".join(sorted(characters))))
    return characters


def tokenize(texts: Texts, tokenizer: Tokenizer, on_progress: Progress | None = None) -> Tokens:
    """Return the token ids of the texts from the cache; tokenize and cache them if they are not there.

    Memory is about 64 times `source_files.CHUNK_BYTES`, independent of the size of the texts. Raises DataError
    and TokenizerError.
    """
    entry = cache_folder() / _digest(texts.files, texts.field, tokenizer.content_hash)
    shards = _open_entry(entry)
    if shards is None:
        with _writing_cache():
            make_folder(entry.parent)
            _remove_stale(entry.parent)
            partial = entry.with_name(f".{entry.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
            try:
                _write_entry(partial, texts, tokenizer, on_progress)
                shards = _publish(partial, entry)
            finally:
                remove_folder(partial)
    return Tokens(shards, tokenizer.vocab_size, texts.name, known_in_range=True)


def cache_folder() -> Path:
    """Return the token cache: `$MOEZOO_CACHE`, else `moezoo/tokens` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if folder := os.environ.get("MOEZOO_CACHE"):
        return Path(folder).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moezoo" / "tokens"


def _encode(texts: Texts, tokenizer: Tokenizer, on_bytes: Callable[[int], None]) -> Iterator[Ids]:
    """Yield the ids of all documents: each after the first tokens, and the end-of-text token between two of them.

    Without any of these tokens, documents are separated by a blank line. If the end-of-text token is also the first
    token, it is there once.
    """
    end = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    pieces = texts.pieces(on_bytes)
    if not end and not tokenizer.first_tokens:
        pieces = (BETWEEN_DOCUMENTS if piece is None else piece for piece in pieces)
    for between, document in itertools.groupby(pieces, key=lambda piece: piece is None):
        if not between:
            yield from _encode_document((piece or "" for piece in document), tokenizer, texts.name)
        elif end != tokenizer.first_tokens:
            yield np.array(end, np.int32)


def _encode_document(pieces: Iterator[str], tokenizer: Tokenizer, where: str) -> Iterator[Ids]:
    begun = False
    for ids in encode_pieces(pieces, tokenizer, where):
        yield with_first_tokens(ids, tokenizer) if len(ids) and not begun else ids
        begun = begun or len(ids) > 0


# --- cache entries ---------------------------------------------------------------------------------------------------


def _write_entry(folder: Path, texts: Texts, tokenizer: Tokenizer, on_progress: Progress | None) -> None:
    make_folder(folder)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with contextlib.closing(_ShardWriter(folder, dtype)) as writer:
        for ids in _encode(texts, tokenizer, texts.counter("tokenizing", on_progress)):
            writer.write(ids)
    index = {
        "files": [file.name for file in texts.files],
        "tokenizer": tokenizer.kind,
        "counts": writer.counts,
    }
    write_atomically(folder / "index.json", json.dumps(index, indent=1))


def _publish(partial: Path, entry: Path) -> list[IdFile]:
    """Rename a complete entry to its final name, unless another process has written it first."""
    shards = _open_entry(entry)
    if shards is None:
        remove_folder(entry)  # damaged
        try:
            rename_folder(partial, entry)
        except RunError:
            if _open_entry(entry) is None:
                raise
        shards = _open_entry(entry)
    assert shards is not None  # it was just written
    return shards


def _open_entry(entry: Path) -> list[IdFile] | None:
    """Return the shards of an entry; None if it is missing or incomplete."""
    try:
        counts = parse_json(read_bounded(entry / "index.json", _MAX_JSON_BYTES))["counts"]
        shards = [open_shard(_shard_path(entry, number), str(entry)) for number in range(len(counts))]
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return shards if [len(shard) for shard in shards] == counts else None


class _ShardWriter:
    """Writer of ids into `.npy` files of `SHARD_TOKENS` each; the count in the header is updated when it is closed."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self.counts: list[int] = []
        self._folder, self._dtype = folder, dtype
        self._file: BinaryIO | None = None

    def write(self, ids: Ids) -> None:
        while len(ids):
            if self._file is None:
                self._file = open(_shard_path(self._folder, len(self.counts)), "xb")  # noqa: SIM115
                self.counts.append(0)
                self._write_header(SHARD_TOKENS)
            now = ids[: SHARD_TOKENS - self.counts[-1]]
            self._file.write(now.astype(self._dtype).data)
            self.counts[-1] += len(now)
            ids = ids[len(now) :]
            if self.counts[-1] == SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            with self._file:
                self._file.seek(0)
                self._write_header(self.counts[-1])  # of the same length, since numpy pads headers
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file = None

    def _write_header(self, count: int) -> None:
        assert self._file is not None
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def _digest(files: Sequence[SourceFile], *more: str | None) -> str:
    content = [_FORMAT, [[file.name, file.size, file.stamp] for file in files], *more]
    return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()[:32]


def _remove_stale(folder: Path) -> None:
    """Remove incomplete entries that a killed process left at least a day ago."""
    for partial in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_S:
                remove_folder(partial) if partial.is_dir() else partial.unlink()


@contextlib.contextmanager
def _writing_cache() -> Iterator[None]:
    """Convert errors while the cache is written into DataErrors; errors of the sources are DataErrors already."""
    try:
        yield
    except (OSError, RunError) as error:
        raise DataError(
            f"token cache cannot be written; got {cache_folder()} ({error}); expected a writable folder with free "
            "space (MOEZOO_CACHE). Set MOEZOO_CACHE to another folder."
        ) from error
