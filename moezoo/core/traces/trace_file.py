"""Files of routing traces: safetensors, written and read a part at a time.

The columns of a trace are tensors of the same names. `__metadata__` has `format: moezoo routing trace 1` and `trace`,
the TraceInfo as JSON. The texts of the token ids that occur are `text_token` int32 [U], ascending, `text_end` int64
[U], and `text_bytes` uint8: the UTF-8 text of the ids one after the other.
"""

import contextlib
import errno
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from moezoo.core.checkpoint.safetensors_file import SafetensorsFile
from moezoo.core.checkpoint.safetensors_header import encode_header, format_dtype, numpy_form, parse_header
from moezoo.core.errors import CheckpointError, DataError
from moezoo.core.files import atomic_writer, readable_errors
from moezoo.core.traces.trace import COLUMNS, RoutingTrace, TraceInfo, TraceRows

FORMAT = "moezoo routing trace 1"
_TEXT_COLUMNS: Mapping[str, type[np.generic]] = {"text_token": np.int32, "text_end": np.int64, "text_bytes": np.uint8}
_MAX_TEXT_BYTES = 1 << 28
_BLANKS = {"expert": -1, "runner_up": -1, "margin": np.inf, "loss": np.nan}
_BLANK_TOKENS = 4096


class TraceWriter:
    """Writer of a trace of any length, in constant memory; made by `write_trace`.

    Rows go to temporary files beside the target, one per column, because a safetensors file begins with the number of
    tokens.
    """

    def __init__(self, path: Path, info: TraceInfo, files: contextlib.ExitStack) -> None:
        self.info, self.texts, self.num_tokens = info, dict[int, str](), 0
        self._path, self._files = path, files
        self._columns: dict[str, tuple[tuple[int, ...], IO[bytes]]] = {}
        with readable_errors(f"cannot write {path}"):  # before the work of recording
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
            with tempfile.TemporaryFile(dir=path.parent):
                pass

    def add(self, rows: TraceRows) -> None:
        """Append rows. All must have the same columns. Raises DataError: they do not; RunError: the disk is full."""
        columns = rows.columns
        if not self._columns:
            with readable_errors(f"cannot write {self._path}"):
                for name, column in columns.items():
                    file = self._files.enter_context(tempfile.TemporaryFile(dir=self._path.parent))  # noqa: SIM115
                    self._columns[name] = column.shape[1:], file
        if columns.keys() != self._columns.keys():
            raise DataError(
                f"rows of a trace have the columns {', '.join(columns)}; expected {', '.join(self._columns)}."
            )
        for name, column in columns.items():
            shape, target = self._columns[name]
            if column.shape != (len(rows), *shape):
                raise DataError(f"{name} of a trace has shape {list(column.shape)}; expected {[len(rows), *shape]}.")
            with readable_errors(f"cannot write {self._path}"):
                target.write(np.ascontiguousarray(column, COLUMNS[name][0]).data)
        self.num_tokens += len(rows)

    def reserve(self, count: int, num_layers: int, top_k: int) -> None:
        """Append rows of unknown routing and loss, to be filled by `put`. Raises RunError: the disk is full."""
        sizes = {"L": num_layers, "K": top_k}
        for first in range(0, count, _BLANK_TOKENS):
            number = min(_BLANK_TOKENS, count - first)
            blank = {
                name: np.full((number, *(sizes[axis] for axis in axes[1:])), _BLANKS.get(name, 0), dtype)
                for name, (dtype, axes) in COLUMNS.items()
            }
            self.add(TraceRows(**blank))

    def put(self, first: int, columns: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite these columns of the rows from `first` on. Raises RunError: the disk is full."""
        for name, column in columns.items():
            shape, target = self._columns[name]
            dtype = np.dtype(COLUMNS[name][0])
            with readable_errors(f"cannot write {self._path}"):
                target.seek(first * dtype.itemsize * math.prod(shape))
                target.write(np.ascontiguousarray(column, dtype).data)

    def finish(self) -> None:
        """Write the file. Raises DataError: no row was added; RunError."""
        if not self._columns:
            raise DataError(f"{self._path} was not written: the trace has no token; expected at least one.")
        texts = _encoded_texts(self.texts)
        forms = {
            name: (format_dtype(name, np.dtype(COLUMNS[name][0])), (self.num_tokens, *shape))
            for name, (shape, _) in self._columns.items()
        }
        forms |= {name: (format_dtype(name, column.dtype), column.shape) for name, column in texts.items()}
        header = encode_header(forms, {"format": FORMAT, "trace": self.info.model_dump_json()})
        entries, _ = parse_header(header)
        with atomic_writer(self._path) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name, entry in sorted(entries.items(), key=lambda item: item[1].start_byte):
                file.seek(entry.start_byte)
                if name in texts:
                    file.write(texts[name].data)
                else:
                    self._columns[name][1].seek(0)
                    shutil.copyfileobj(self._columns[name][1], file, 1 << 20)


@contextlib.contextmanager
def write_trace(path: str | Path, info: TraceInfo) -> Iterator[TraceWriter]:
    """Write a trace atomically: `add` rows to the writer, and put texts into its `texts`; after an error, no file."""
    with contextlib.ExitStack() as temporary_files:
        writer = TraceWriter(Path(path), info, temporary_files)
        yield writer
        writer.finish()


def save_trace(path: str | Path, trace: RoutingTrace) -> None:
    """Write a trace to a file, a part at a time."""
    with write_trace(path, trace.info) as writer:
        writer.texts.update(trace.texts)
        for rows in trace.chunks():
            writer.add(rows)


def open_trace(path: str | Path) -> RoutingTrace:
    """Open the file of a trace. Names, dtypes and shapes are checked; values are when they are read.

    Raises DataError: not such a file, or a damaged one.
    """
    _check_kind(Path(path))
    try:
        columns = _Columns(Path(path))
        info = TraceInfo.model_validate_json(columns.metadata["trace"])
        texts = columns.texts()
    except CheckpointError as error:
        raise DataError(str(error)) from None
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(f"{path} has invalid metadata of a trace; got {what:.200}. Record it again.") from None
    return RoutingTrace(info, columns, texts, str(path))


def _check_kind(path: Path) -> None:
    """Raises DataError: a file that is readable and does not begin as safetensors files do."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return  # whoever reads it says why it cannot be read
    if start[8:] != b"{":
        raise DataError(
            f"{path} is not a routing trace: it is no safetensors file; expected a file that `moezoo trace` wrote. "
            "Record one with `moezoo trace MODEL --data FILE`, or convert one with `moezoo trace --from`."
        )


class _Columns:
    """Columns of the file of a trace."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, SafetensorsFile(path)
        self.metadata: dict[str, str] = json.loads(self._file.header).get("__metadata__") or {}
        if self.metadata.get("format") != FORMAT or "trace" not in self.metadata:
            raise DataError(
                f"{path} is not a routing trace; got the format {self.metadata.get('format')!r:.80}; expected "
                f"{FORMAT!r}. Record one with `moezoo trace`, or convert one with `moezoo trace --from`."
            )
        forms = {name: numpy_form(entry) for name, entry in self._file.entries.items()}
        for name, (dtype, _) in forms.items():
            wanted = COLUMNS[name][0] if name in COLUMNS else _TEXT_COLUMNS.get(name)
            if wanted is None or dtype != np.dtype(wanted):
                raise DataError(f"{path} has {name!r:.80} of dtype {dtype}; expected {wanted}. Record it again.")
        self.shapes = {name: shape for name, (_, shape) in forms.items() if name in COLUMNS}
        self._text_shapes = {name: shape for name, (_, shape) in forms.items() if name in _TEXT_COLUMNS}

    def read(self, name: str, first: int, last: int) -> NDArray[Any]:
        """Return rows of a column. Raises DataError: the file was changed or truncated."""
        try:
            return self._file.read(name, rows=(first, max(first, last)))
        except CheckpointError as error:
            raise DataError(str(error)) from None

    def texts(self) -> dict[int, str]:
        """Return the text of each token id. Raises DataError: damaged tables."""
        if not self._text_shapes:
            return {}
        damaged = DataError(f"{self._path} has damaged texts of tokens; expected {', '.join(_TEXT_COLUMNS)}.")
        if self._text_shapes.keys() != _TEXT_COLUMNS.keys() or self._text_shapes["text_bytes"] > (_MAX_TEXT_BYTES,):
            raise damaged
        token, end, content = (self._file.read(name) for name in _TEXT_COLUMNS)
        if token.ndim != 1 or end.shape != token.shape or content.ndim != 1:
            raise damaged
        start = np.concatenate([[0], end])
        if (np.diff(start) < 0).any() or start[-1] != len(content):
            raise damaged
        whole = content.tobytes()
        spans = zip(token.tolist(), start[:-1].tolist(), end.tolist(), strict=True)
        return {key: whole[first:last].decode("utf-8", "replace") for key, first, last in spans}


def _encoded_texts(texts: Mapping[int, str]) -> dict[str, NDArray[Any]]:
    """Return the columns of the texts, by name; none without texts."""
    if not texts:
        return {}
    encoded = [texts[token].encode("utf-8", "replace") for token in sorted(texts)]
    return {
        "text_token": np.array(sorted(texts), np.int32),
        "text_end": np.cumsum([len(text) for text in encoded]).astype(np.int64),
        "text_bytes": np.frombuffer(b"".join(encoded), np.uint8),
    }
