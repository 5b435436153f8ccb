"""Token ids on disk: shards that are memory-mapped, and the cache into which texts are tokenized once.

A cache entry is a folder of `.npy` shards named by a hash of what it was made from: the files (path, size, time of
change), the field of a JSONL source, and the tokenizer. It is made under another name, flushed, and renamed, so
that an entry is whole or not there.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from moezoo.core.data import source_files
from moezoo.core.data.source_files import SourceFile, documents_of, text_of
from moezoo.core.data.tokenizers import HuggingFaceTokenizer, Ids, Tokenizer
from moezoo.core.errors import DataError, RunError
from moezoo.core.files import flush_folder, make_folder, remove_folder, rename_folder, write_atomically
from moezoo.core.progress import Progress

SHARD_TOKENS = 1 << 26
BETWEEN_DOCUMENTS = "\n\n"  # where the tokenizer has no end of text

_Shard = npt.NDArray[np.integer[Any]]

_FORMAT = 1  # of a cache entry
_BIN_MAGIC, _BIN_VERSION, _BIN_HEADER = 20240520, 1, 256  # modded-nanogpt: 256 int32, then uint16 tokens
_FIRST_LOOK = 1 << 16  # tokens of each shard whose range is checked when it is opened
_STALE_S = 24 * 3600.0


class Tokens:
    """Token ids over one or more shards, as if they were one array. Read only, memory-mapped."""

    def __init__(self, shards: Sequence[_Shard], vocab_size: int, name: str, known_in_range: bool) -> None:
        """`name` stands in errors. Ids not `known_in_range` are checked against `vocab_size` when read."""
        self._shards = tuple(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        self._begins = [0, *self._ends.tolist()]
        self._vocab_size, self._name, self._known_in_range = vocab_size, name, known_in_range
        narrow = all(shard.dtype.itemsize < 4 or shard.dtype == np.int32 for shard in self._shards)
        self._dtype = np.dtype(np.int32 if narrow or known_in_range else np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def read(self, starts: npt.NDArray[np.integer[Any]], length: int) -> Ids:
        """Windows of `length` ids that begin at `starts`, each inside the array: int32 [n, length].

        Raises DataError for an id outside the vocabulary.
        """
        rows = np.empty((len(starts), length), self._dtype)
        shard_of = np.searchsorted(self._ends, starts, side="right")
        for row, k, start in zip(rows, shard_of.tolist(), starts.tolist(), strict=True):
            at = int(start) - self._begins[k]
            done = 0
            while done < length:  # once, unless the window crosses into the next shard
                piece = self._shards[k][at : at + length - done]
                row[done : done + len(piece)] = piece
                done, k, at = done + len(piece), k + 1, 0
        if not self._known_in_range:
            check_range(rows, self._vocab_size, self._name)
        return rows.astype(np.int32, copy=False)


def check_range(ids: npt.NDArray[np.integer[Any]], vocab_size: int, name: str) -> None:
    """Raises DataError for an id outside [0, vocab_size)."""
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        low, high = int(ids.min()), int(ids.max())
        raise DataError(
            f"token id outside the vocabulary; got {low if low < 0 else high}; expected 0 to {vocab_size - 1}; {name}. "
            "Name the tokenizer that made the shards in data.tokenizer."
        )


# --- shards that others wrote ----------------------------------------------------------------------------------------


def open_shards(files: Sequence[SourceFile], vocab_size: int, name: str) -> Tokens:
    """Memory-map `.npy` and `.bin` shards; remote ones are copied into the cache first.

    Raises DataError: not a shard, damaged, empty, ids outside the vocabulary in the first 65536 of a shard (the
    rest is checked as it is read).
    """
    shards = [open_shard(local_copy(file), file.name) for file in files]
    for shard, file in zip(shards, files, strict=True):
        check_range(shard[:_FIRST_LOOK], vocab_size, file.name)
    return Tokens(shards, vocab_size, name, known_in_range=False)


def open_shard(path: Path, name: str) -> _Shard:
    """Memory-map one shard. `name` stands in errors. Raises DataError where it is not one, damaged or empty."""
    shard = _open_bin(path, name) if path.suffix == ".bin" else _open_npy(path, name)
    if not len(shard):
        raise DataError(f"token shard is empty; got 0 tokens; expected some; {name}. Leave it out.")
    return shard


def _open_npy(path: Path, name: str) -> _Shard:
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"token shard is damaged or not a .npy file; got {name} ({error}); expected integers as numpy.save writes "
            "them. Write it again."
        ) from None
    if not isinstance(shard, np.ndarray) or shard.ndim != 1 or shard.dtype.kind not in "iu":
        got = f"{shard.dtype} {list(shard.shape)}" if isinstance(shard, np.ndarray) else type(shard).__name__
        raise DataError(
            f"token shard is not a list of ids; got {got}; expected integers in one dimension; {name}. "
            "Write numpy.save(path, ids.astype(numpy.uint16))."
        )
    return shard.view(np.ndarray)  # slices of a numpy.memmap cost four times as much


def _open_bin(path: Path, name: str) -> _Shard:
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", min(_BIN_HEADER, size // 4))
    except OSError as error:
        raise DataError(f"token shard cannot be read; got {name} ({error}). Check its permissions.") from None
    expected = f"expected the magic number {_BIN_MAGIC} and version {_BIN_VERSION}, as modded-nanogpt writes them"
    if len(header) < _BIN_HEADER or header[0] != _BIN_MAGIC or header[1] != _BIN_VERSION:
        got = f"{header[0]} and {header[1]}" if len(header) >= 2 else "nothing"
        raise DataError(
            f"token shard has another header; got {got} in {size} bytes; {expected}; {name}. "
            "Write it again, or as .npy."
        )
    count, present = int(header[2]), (size - 4 * _BIN_HEADER) / 2
    if count != present:
        raise DataError(
            f"token shard is damaged: its header says {count} tokens, but its size has room for {present:g}; {name}. "
            "Download or write it again."
        )
    if not count:
        return np.zeros(0, np.uint16)
    return np.memmap(path, "<u2", "r", offset=4 * _BIN_HEADER, shape=(count,)).view(np.ndarray)


def local_copy(file: SourceFile) -> Path:
    """The file's path, or that of its copy in the cache where it is remote."""
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
    """The documents of one source: each file one document, or each line of JSONL files (`field` of it)."""

    name: str  # in errors and progress
    files: tuple[SourceFile, ...]
    field: str | None = None

    def pieces(self, on_bytes: Callable[[int], None]) -> Iterator[str | None]:
        """The text in pieces that fit into memory; None between two documents."""
        begun = False
        for file in self.files:
            documents: Iterator[Iterator[str]]
            if self.field is None:
                documents = iter([text_of(file, on_bytes)])
            else:
                documents = (iter([text]) for text in documents_of(file, self.field, on_bytes))
            for document in documents:
                if begun:
                    yield None
                begun = True
                yield from document

    def counter(self, what: str, on_progress: Progress | None) -> Callable[[int], None]:
        """A function that adds up bytes and reports them."""
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
    """Every character in the texts, and between them; found in one pass, kept in the cache."""
    file = cache_folder() / f"{_digest(texts.files, texts.field)}.characters.json"
    with contextlib.suppress(OSError, ValueError):
        return set(str(json.loads(file.read_text(encoding="ascii"))))
    characters: set[str] = set()
    for piece in texts.pieces(texts.counter("reading", on_progress)):
        characters.update(BETWEEN_DOCUMENTS if piece is None else piece)
    with _writing_cache():
        make_folder(file.parent)
        write_atomically(file, json.dumps("".join(sorted(characters))))
    return characters


def tokenize(texts: Texts, tokenizer: Tokenizer, on_progress: Progress | None = None) -> Tokens:
    """The texts' token ids, from the cache, or else made and put there.

    Memory stays at some 64 times `source_files.CHUNK_BYTES`, whatever the size of the texts. Raises DataError
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
    """`$MOEZOO_CACHE`, or `moezoo/tokens` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if given := os.environ.get("MOEZOO_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moezoo" / "tokens"


def _encoded(texts: Texts, tokenizer: Tokenizer, on_bytes: Callable[[int], None]) -> Iterator[Ids]:
    words = isinstance(tokenizer, HuggingFaceTokenizer)
    limit = source_files.CHUNK_BYTES
    held: list[str] = []
    size = 0
    for piece in texts.pieces(on_bytes):
        if piece is None and tokenizer.end_of_text is not None:
            yield tokenizer.encode("".join(held), where=texts.name)
            yield np.array([tokenizer.end_of_text], np.int32)
            held, size = [], 0
            continue
        held.append(BETWEEN_DOCUMENTS if piece is None else piece)
        size += len(held[-1])
        if size >= limit:
            text = "".join(held)
            border = word_border(text) if words else size
            if not border and size >= 16 * limit:
                border = size  # a text without spaces: some token at this border is another one
            yield tokenizer.encode(text[:border], where=texts.name)
            held, size = [text[border:]], size - border
    yield tokenizer.encode("".join(held), where=texts.name)


def word_border(text: str) -> int:
    """The last place where a text can be cut such that the parts' tokens are the whole's; 0 if there is none.

    It is after a single newline, else before a single space, with no white space on either side: there, the
    pre-tokenizers of GPT-2, Llama 3 and Qwen cut anyway, whereas in a run of white space what follows matters.
    """
    for mark, offset in (("\n", 1), (" ", 0)):
        at = len(text) - 1
        while (at := text.rfind(mark, 1, at)) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + offset
    return 0


# --- cache entries ---------------------------------------------------------------------------------------------------


def _write_entry(folder: Path, texts: Texts, tokenizer: Tokenizer, on_progress: Progress | None) -> None:
    make_folder(folder)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with contextlib.closing(_ShardWriter(folder, dtype)) as writer:
        for ids in _encoded(texts, tokenizer, texts.counter("tokenizing", on_progress)):
            writer.write(ids)
    index = {
        "files": [file.name for file in texts.files],
        "tokenizer": tokenizer.kind,
        "counts": writer.counts,
    }
    write_atomically(folder / "index.json", json.dumps(index, indent=1))


def _publish(partial: Path, entry: Path) -> list[_Shard]:
    """Rename a finished entry to its place, unless another process was faster."""
    shards = _open_entry(entry)
    if shards is None:
        remove_folder(entry)  # a damaged one
        try:
            rename_folder(partial, entry)
        except RunError:
            if _open_entry(entry) is None:
                raise
        shards = _open_entry(entry)
    assert shards is not None  # it has just been written
    return shards


def _open_entry(entry: Path) -> list[_Shard] | None:
    """The shards of an entry; None where it is not there or not whole."""
    try:
        counts = json.loads((entry / "index.json").read_text(encoding="utf-8"))["counts"]
        shards = [open_shard(_shard_path(entry, number), str(entry)) for number in range(len(counts))]
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return shards if [len(shard) for shard in shards] == counts else None


class _ShardWriter:
    """Writes ids into `.npy` files of `SHARD_TOKENS` each, whose number in the header is set when one is full."""

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
                self._write_header(self.counts[-1])  # as long as the first: numpy pads it for any count
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
    """Entries that a killed process left half-made a day ago or earlier."""
    for partial in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_S:
                remove_folder(partial) if partial.is_dir() else partial.unlink()


@contextlib.contextmanager
def _writing_cache() -> Iterator[None]:
    """Failures to write become DataErrors; the sources' own are DataErrors already."""
    try:
        yield
    except (OSError, RunError) as error:
        raise DataError(
            f"token cache cannot be written; got {cache_folder()} ({error}); expected a writable folder with room "
            "(MOEZOO_CACHE). Set MOEZOO_CACHE to another folder."
        ) from error
