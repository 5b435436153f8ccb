"""Conversion of Hugging Face checkpoints to run folders, and of runs to Hugging Face checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import LazyTensors, shapes_of
from moezoo.core.data.load_tokenizer import tokenizer_notes
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.ledger import Ledger
from moezoo.core.huggingface.nonfinite import nonfinite_warning
from moezoo.core.progress import Progress
from moezoo.core.runs.convert_adapter import merged
from moezoo.core.runs.open import open_model
from moezoo.core.runs.save import export, save_run

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Fields:
        format: of the new folder: `moezoo`, `huggingface`, or the layout `mlx` or `transformers`.
        ledger: the mapping of every tensor of the Hugging Face checkpoint.
        notes: one-line notes for the user.
        step: number of updates that the written weights have been trained for here.
    """

    format: str
    ledger: Ledger
    notes: list[str]
    step: int = 0


def convert(
    path: str | Path,
    out: Path,
    on_progress: Progress | None = None,
    *,
    merge: bool = False,
    adapter: str | Path | None = None,
) -> Conversion:
    """Convert a Hugging Face folder or hub id into a run folder, or a run into a Hugging Face folder.

    Conversion into a run folder keeps one parameter in memory at a time. A round trip without changes is bit-exact.
    `on_progress`: progress callback, in parameters. With `merge`, a run of an adapter, or a model with `adapter`,
    becomes a Hugging Face folder with the adapter merged into its base, whose weights are floats.

    Raises what `open_model` raises. Raises RunError: `out` is not empty. Raises SpecError: no family can represent the
    run's model.
    """
    opened = open_model(path, adapter=adapter)
    opened = merged(opened) if merge else opened
    if opened.checkpoint is not None and not merge:
        weights = _WithProgress(opened.weights, on_progress)
        save_run(out, opened.config, opened.tokenizer, weights, 0, opened.layout)
        warning = nonfinite_warning(list(opened.checkpoint.weights.nonfinite), str(opened.path))
        notes = [*opened.problems, *([warning] if warning else []), *tokenizer_notes(opened.tokenizer)]
        return Conversion("moezoo", opened.checkpoint.ledger, notes)
    notes = export(opened.weights, opened.config, opened.tokenizer, opened.layout, out, step=opened.step)
    ledger = open_checkpoint(out).ledger
    return Conversion("huggingface", ledger, opened.problems + notes, opened.step)


class _WithProgress(LazyTensors):
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
            self._on_progress("converting", self._done, len(self._inner))
        return value
