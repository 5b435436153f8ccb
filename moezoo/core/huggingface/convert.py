"""Conversion of Hugging Face checkpoints to run folders, and of runs to Hugging Face checkpoints."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.ledger import Entry, Ledger
from moezoo.core.huggingface.nonfinite import nonfinite_warning
from moezoo.core.loaded_model import export, save_run
from moezoo.core.opened_model import open_model
from moezoo.core.safetensors_file import ReadWhenAsked, shapes_of

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]  # parameters done, total


@dataclass(frozen=True)
class LedgerRow:
    """Tensors that differ only in layer and expert index, which `*` replaces in names."""

    theirs: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    status: str
    ours: tuple[str, ...]


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion: `format` of the new folder, ledger of the checkpoint's tensors, one-line notes."""

    format: str
    ledger: Ledger
    notes: list[str]


def ledger_rows(ledger: Ledger) -> list[LedgerRow]:
    """Return the ledger with equal tensors of all layers and experts grouped in one row."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in ledger.entries:
        theirs, ours = _pattern(entry.name), tuple(_pattern(name) for name in entry.ours)
        groups.setdefault((theirs, entry.dtype, entry.shape, entry.status, ours), []).append(entry)
    return [
        LedgerRow(theirs, dtype, shape, len(entries), status, ours)
        for (theirs, dtype, shape, status, ours), entries in groups.items()
    ]


def ledger_text(ledger: Ledger) -> str:
    """Return the ledger as text, one line per row: status, dtype and shape, count, tensor name, parameters."""
    rows = [
        (row.status, f"{row.dtype} {list(row.shape)}", f"{row.count}x", row.theirs, ", ".join(row.ours))
        for row in ledger_rows(ledger)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{status:<{widths[0]}}  {stored:<{widths[1]}}  {count:>{widths[2]}}  {theirs}{' -> ' if ours else ''}{ours}"
        for status, stored, count, theirs, ours in rows
    )


def convert(path: str | Path, out: Path, on_progress: Progress | None = None) -> Conversion:
    """Convert a Hugging Face folder or hub id into a run folder, or a run into a Hugging Face folder.

    Into a run folder, one parameter at a time is in memory. A round trip without changes is bit-exact.

    Raises as `open_model`, RunError if `out` is not empty, and SpecError if no family computes the run's model.
    """
    opened = open_model(path)
    if opened.checkpoint is not None:
        weights = _WithProgress(opened.weights, on_progress)
        save_run(out, opened.config, opened.tokenizer, weights, 0, opened.layout)
        warning = nonfinite_warning(list(opened.checkpoint.weights.nonfinite), str(opened.path))
        return Conversion("moezoo", opened.checkpoint.ledger, opened.problems + ([warning] if warning else []))
    notes = export(opened.weights, opened.config, opened.tokenizer, opened.layout, out)
    ledger = open_checkpoint(out).ledger
    return Conversion("huggingface", ledger, opened.problems + notes)


class _WithProgress(ReadWhenAsked):
    """Weights that report progress as they are read."""

    def __init__(self, inner: Mapping[str, Array], on_progress: Progress | None):
        super().__init__(shapes_of(inner))
        self._inner, self._on_progress, self._done = inner, on_progress, 0

    @property
    def dtypes(self) -> Mapping[str, np.dtype[Any]]:
        dtypes: Mapping[str, np.dtype[Any]] = self._inner.dtypes  # type: ignore[attr-defined]
        return dtypes

    def __getitem__(self, name: str) -> Array:
        value = self._inner[name]
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done, len(self._inner))
        return value


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
