"""CSV of one expert per line, `layer,expert`, as people log it from llama.cpp's evaluation callback.

llama.cpp has no such format of its own; forks and scripts write it. Lines are in the order of computation: a pass over
some tokens goes through the layers in ascending order, and in a layer through its tokens, `top_k` lines each. A layer
that is not above the one before begins the next pass. A column `token` (number of the token), if there is one, says it
instead. A header is optional for two columns; lines that begin with `#` are skipped; other columns are ignored.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from moezoo.core.errors import DataError
from moezoo.core.files import atomic_writer, open_regular
from moezoo.core.traces.formats.foreign import Foreign, Known, Request, RequestReader, lost
from moezoo.core.traces.formats.payloads import damaged
from moezoo.core.traces.trace import RoutingTrace

_EXPECTED = "lines layer,expert or token,layer,expert"
_MAX_LINE = 10_000
_MAX_PASS = 1 << 24  # lines of one pass or token
Entry = tuple[int, int, int]
"""Token (0 without a column), layer, expert."""


def read_csv(path: Path, known: Known) -> Foreign:
    """Open a CSV of layers and experts as a trace. Raises DataError."""
    requests = _requests(path, known)
    first = next(requests, None)
    if first is None:
        raise damaged(str(path), "no line", _EXPECTED)
    layers, request = first
    if known.layers is None:
        known = replace(known, layers=layers)

    def several() -> Iterator[tuple[str, Request]]:
        yield "", request
        for number, (_, later) in enumerate(requests):
            yield f"pass {number + 1}", replace(later, continues=True)

    return RequestReader(known, "csv", str(path), path.stem).read(several())


def _requests(path: Path, known: Known) -> Iterator[tuple[tuple[int, ...], Request]]:
    """Yield the layers and the routing of each pass, all of the same layers."""
    expected, width = known.layers, known.top_k
    for pass_ in _passes(_entries(path), str(path)):
        by_layer: dict[int, list[Entry]] = {}
        for entry in pass_:
            by_layer.setdefault(entry[1], []).append(entry)
        layers = tuple(by_layer)
        expected = expected or layers
        if layers != expected:
            raise damaged(str(path), f"the layers {list(layers)!s:.60}", f"{list(expected)!s:.60} in each pass")
        experts = [_by_token(entries, known, str(path)) for entries in by_layer.values()]
        if len({len(rows) for rows in experts}) > 1:
            raise damaged(str(path), "layers with different numbers of lines in a pass", "the same in each layer")
        longest = max(len(row) for rows in experts for row in rows)
        width = width or longest
        if longest > width:
            raise damaged(str(path), f"{longest} experts of a token", f"at most {width}, as before or as in the model")
        padded = [[[*row, *[-1] * (width - len(row))] for row in rows] for rows in experts]
        yield layers, Request(np.array(padded, np.int64).transpose(1, 0, 2))


def _passes(entries: Iterator[Entry], where: str) -> Iterator[list[Entry]]:
    found: list[Entry] = []
    for entry in entries:
        if found and (entry[0] != found[-1][0] or entry[1] < found[-1][1]):
            yield found
            found = []
        found.append(entry)
        if len(found) > _MAX_PASS:
            raise damaged(where, f"more than {_MAX_PASS} lines in ascending layers", _EXPECTED)
    if found:
        yield found


def _by_token(entries: list[Entry], known: Known, where: str) -> list[list[int]]:
    """Return the experts of each token of a pass in a layer."""
    if entries[0][0] >= 0:
        return [[expert for _, _, expert in entries]]
    if known.top_k is None:
        raise DataError(
            f"{where} does not say how many experts a token has; expected a column `token`, or --model or --top-k."
        )
    if len(entries) % known.top_k:
        raise damaged(where, f"{len(entries)} lines of a layer in a pass", f"{known.top_k} for each token (top_k)")
    experts = [expert for _, _, expert in entries]
    return [experts[first : first + known.top_k] for first in range(0, len(experts), known.top_k)]


def _entries(path: Path) -> Iterator[Entry]:
    """Yield token (-1 without such a column), layer and expert of each line."""
    try:
        with open_regular(path) as raw, io.TextIOWrapper(io.BufferedReader(raw), "utf-8", newline="") as text:
            lines = (line for line in _bounded(text) if line.strip() and not line.startswith("#"))
            columns: tuple[int, int, int] | None = None
            for number, fields in enumerate(csv.reader(lines)):
                if columns is None:
                    columns = _columns(fields)
                    if any("layer" in field for field in fields):
                        continue
                yield _entry(fields, columns, number)
    except (OSError, ValueError, csv.Error) as error:
        raise damaged(str(path), error, _EXPECTED) from None


def _bounded(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
            raise ValueError(f"a line of more than {_MAX_LINE} characters")
        yield line


def _columns(fields: list[str]) -> tuple[int, int, int]:
    """Return the positions of token (-1: none), layer and expert, by the header or as they are expected."""
    names = [field.strip().lower() for field in fields]
    if "layer" in names and "expert" in names:
        return names.index("token") if "token" in names else -1, names.index("layer"), names.index("expert")
    if len(names) not in (2, 3) or any("layer" in name for name in names):
        raise ValueError(f"the columns {', '.join(names)[:100]!r}")
    return (-1, 0, 1) if len(names) == 2 else (0, 1, 2)


def _entry(fields: list[str], columns: tuple[int, int, int], number: int) -> Entry:
    try:
        token, layer, expert = (-1 if column < 0 else int(fields[column][:20]) for column in columns)
    except (ValueError, IndexError):
        raise ValueError(f"data line {number + 1}: {','.join(fields)[:60]!r}") from None
    if not 0 <= layer < 2**31 or not -1 <= expert < 2**31 or (columns[0] >= 0 and not 0 <= token < 2**62):
        raise ValueError(f"data line {number + 1}: {','.join(fields)[:60]!r}")
    return token, layer, expert


def write_csv(trace: RoutingTrace, path: Path, depth: int | None) -> list[str]:
    """Write a trace as lines `layer,expert`, token after token; return what is lost."""
    del depth
    layer_LK = np.broadcast_to(np.array(trace.info.layers)[:, None], (trace.num_layers, trace.top_k))
    with atomic_writer(path) as file:
        file.write(b"layer,expert\n")
        for rows in trace.chunks():
            pairs = np.stack(np.broadcast_arrays(layer_LK, rows.expert), axis=-1).reshape(-1, 2).tolist()
            file.write("".join(f"{layer},{expert}\n" for layer, expert in pairs).encode())
    return lost(trace, (), "csv")
