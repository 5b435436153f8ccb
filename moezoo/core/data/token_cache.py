"""Cache on disk of tokenized text, sets of characters, and copies of remote files.

An entry is named by a hash of its key, which is everything that decides its content. It is written under a temporary
name, synced and renamed, so that it is either complete or missing. Every file has its SHA-256 in an index, and the
index has its own: whatever is read back is verified first. A damaged entry is made again, and the user is told.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moezoo.core.data.source_files import SourceFile
from moezoo.core.data.token_shards import IdFile, open_shard
from moezoo.core.data.tokenizers import Ids, hash_of
from moezoo.core.errors import DataError, RunError
from moezoo.core.files import (
    flush_folder,
    make_folder,
    read_bounded,
    reason_of,
    remove_folder,
    rename_folder,
    sha256_of,
    write_atomically,
)
from moezoo.core.json_text import parse_json
from moezoo.core.progress import Message, Progress

SHARD_TOKENS = 1 << 26

Key = dict[str, Any]
"""JSON values that decide the content of an entry."""

_FORMAT = 3  # of entries, and of the code that makes them: part of every key
_INDEX = "index.json"
_MAX_INDEX_BYTES = 100_000_000
_STALE_S = 24 * 3600.0


class _DamagedError(RunError):
    """An entry that differs from what was written; the message says in what."""


def cache_folder() -> Path:
    """Return the token cache: `$MOEZOO_CACHE`, else `moezoo/tokens` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if folder := os.environ.get("MOEZOO_CACHE"):
        return Path(folder).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moezoo" / "tokens"


def files_key(files: Sequence[SourceFile]) -> list[list[Any]]:
    """Return the part of a key for the content of files.

    A local file's time of change (ctime) is part of it, because tools that copy or unpack can set a file's modification
    time to that of other content of equal size.
    """
    return [[file.name, file.size, file.stamp, _ctime_ns(file)] for file in files]


def _ctime_ns(file: SourceFile) -> int | None:
    with contextlib.suppress(OSError):  # it was removed just now: reading it raises the error
        return None if file.filesystem is not None else os.stat(file.name).st_ctime_ns
    return None


def cached_value(key: Key, make: Callable[[], Any], on_message: Message) -> Any:
    """Return the JSON value of a key, from the cache or from `make`. Raises DataError if it cannot be written."""
    file = cache_folder() / f"{_name(key)}.json"
    try:
        return _read_signed(file, key)["value"]
    except FileNotFoundError:
        pass
    except _DamagedError as damage:
        on_message(_made_again(file, damage))
    value = make()
    with _writing_cache():
        make_folder(file.parent)
        _write_signed(file, key, value=value)
    return value


def cached_tokens(
    key: Key,
    make: Callable[[], Iterable[Ids]],
    dtype: str,
    name: str,
    on_progress: Progress | None,
    on_message: Message,
) -> list[IdFile]:
    """Return the shards of a key, from the cache or from the ids that `make` yields.

    Shards from the cache are verified: `on_progress` is called with bytes. `dtype` is that of new shards, as NumPy
    writes it; `name` is used in errors and progress.
    Raises DataError if the cache cannot be written, and what `make` raises.
    """
    entry = cache_folder() / _name(key)
    try:
        return _open_entry(entry, key, name, on_progress)
    except FileNotFoundError:
        pass
    except _DamagedError as damage:
        on_message(_made_again(entry, damage))
    with _writing_cache():
        make_folder(entry.parent)
        _remove_stale(entry.parent)
        partial = entry.with_name(f".{entry.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            _write_entry(partial, key, make(), dtype)
            return _publish(partial, entry, key, name)
        finally:
            remove_folder(partial)


def local_copy(file: SourceFile, on_progress: Progress | None, on_message: Message) -> Path:
    """Return the path of a local file, or of the cached copy of a remote file, which is downloaded if needed.

    A server that does not report a file's size gives no way to tell whether it has changed: it is always downloaded.
    Raises DataError: the download fails or has another size, or the cache cannot be written.
    """
    if file.filesystem is None:
        return Path(file.name)
    key = {"kind": "copy", "format": _FORMAT, "files": files_key([file])}
    copy = cache_folder() / f"{_name(key)}{Path(file.name).suffix}"
    index = copy.with_name(f"{copy.name}.json")
    if file.size is not None and copy.exists():
        try:
            _verify([(copy, _read_signed(index, key)["sha256"])], [file.size], file.name, on_progress)
            return copy
        except FileNotFoundError:
            pass  # a process was killed before it had written the index
        except _DamagedError as damage:
            on_message(_made_again(copy, damage))
    with _writing_cache():
        make_folder(copy.parent)
        partial = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}.partial")
        try:
            digest = _download(file, partial)
            _write_signed(index, key, sha256=digest)
            os.replace(partial, copy)
            flush_folder(copy.parent)
        finally:
            partial.unlink(missing_ok=True)
    return copy


def _download(file: SourceFile, target: Path) -> str:
    """Write the content of a remote file and return its SHA-256."""
    digest, size = hashlib.sha256(), 0
    with open(target, "wb") as out:
        for chunk in file.chunks():
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        out.flush()
        os.fsync(out.fileno())
    if file.size is not None and size != file.size:
        raise DataError(
            f"the download is incomplete; got {size} bytes; expected {file.size}; {file.name}. Start again, and check "
            "the connection."
        )
    return digest.hexdigest()


# --- entries of token shards -----------------------------------------------------------------------------------------


def _write_entry(folder: Path, key: Key, ids: Iterable[Ids], dtype: str) -> None:
    make_folder(folder)
    with contextlib.closing(_ShardWriter(folder, np.dtype(dtype))) as writer:
        for some in ids:
            writer.write(some)
    shards = [_shard_path(folder, number) for number in range(len(writer.counts))]
    rows = [
        {"tokens": count, "bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
        for shard, count in zip(shards, writer.counts, strict=True)
    ]
    _write_signed(folder / _INDEX, key, shards=rows)


def _publish(partial: Path, entry: Path, key: Key, name: str) -> list[IdFile]:
    """Rename a complete entry to its final name, unless another process has written it first."""
    try:
        return _open_entry(entry, key, name, None)
    except FileNotFoundError:
        pass
    except _DamagedError:
        remove_folder(entry)
    try:
        rename_folder(partial, entry)
    except RunError:
        return _open_entry(entry, key, name, None)
    return _open_shards(entry, _read_signed(entry / _INDEX, key), name)


def _open_entry(entry: Path, key: Key, name: str, on_progress: Progress | None) -> list[IdFile]:
    """Return the verified shards of an entry. Raises FileNotFoundError if there is none, and _DamagedError."""
    if not entry.exists():
        raise FileNotFoundError(entry)
    try:
        index = _read_signed(entry / _INDEX, key)
    except FileNotFoundError:
        raise _DamagedError(f"{_INDEX} is missing") from None
    shards = _open_shards(entry, index, name)  # before their content is read: a change from here on is noticed
    rows = [(shard.path, str(row["sha256"])) for shard, row in zip(shards, index["shards"], strict=True)]
    _verify(rows, [int(row["bytes"]) for row in index["shards"]], name, on_progress)
    return shards


def _open_shards(entry: Path, index: dict[str, Any], name: str) -> list[IdFile]:
    shards = []
    for number, row in enumerate(index["shards"]):
        path = _shard_path(entry, number)
        try:
            shards.append(dataclasses.replace(open_shard(path, name), sha256=str(row["sha256"])))
        except DataError:
            raise _DamagedError(f"{path.name} is missing, or not the array that was written") from None
        if len(shards[-1]) != row["tokens"]:
            raise _DamagedError(f"{path.name} has {len(shards[-1])} tokens; expected {row['tokens']}")
    return shards


def _verify(files: Sequence[tuple[Path, str]], sizes: Sequence[int], name: str, on_progress: Progress | None) -> None:
    """Check size and SHA-256 of files. Raises _DamagedError that names the first damaged one."""

    def check(file: Path, size: int, digest: str) -> None:
        try:
            found = file.stat().st_size
        except OSError as error:
            raise _DamagedError(f"{file.name} cannot be read ({reason_of(error)})") from None
        if found != size:
            raise _DamagedError(f"{file.name} has {found} bytes; expected {size}")
        if sha256_of(file) != digest:
            raise _DamagedError(f"the content of {file.name} differs from its SHA-256")

    pool = ThreadPoolExecutor(os.cpu_count())  # hashing and reading run outside of Python's lock
    try:
        checks = [pool.submit(check, file, size, digest) for (file, digest), size in zip(files, sizes, strict=True)]
        done = 0
        for size, pending in zip(sizes, checks, strict=True):
            pending.result()
            done += size
            if on_progress is not None:
                on_progress(f"verifying {name}", done, sum(sizes))
    except RunError as error:
        raise error if isinstance(error, _DamagedError) else _DamagedError(str(error)) from None
    finally:
        pool.shutdown(cancel_futures=True)


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


# --- keys and signed files -------------------------------------------------------------------------------------------


def _name(key: Key) -> str:
    return hash_of([_FORMAT, key])[:32]


def _write_signed(file: Path, key: Key, **values: Any) -> None:
    content = {"key": key, **values}
    write_atomically(file, json.dumps({**content, "sha256 of the above": hash_of(content)}, indent=1))


def _read_signed(file: Path, key: Key) -> dict[str, Any]:
    """Return the values of a file of `_write_signed`. Raises FileNotFoundError and _DamagedError."""
    try:
        content = parse_json(read_bounded(file, _MAX_INDEX_BYTES))
        digest = content.pop("sha256 of the above")
        if digest != hash_of(content):
            raise ValueError("its content differs from its SHA-256")
        if content["key"] != key:
            raise ValueError("it has another key")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(file) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _DamagedError(f"{file.name}: {reason_of(error)}") from None
    return dict(content)


def _made_again(path: Path, damage: _DamagedError) -> str:
    return f"the token cache is damaged and is made again: {damage} ({path})"


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
