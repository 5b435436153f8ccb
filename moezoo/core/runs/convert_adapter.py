"""Conversion of adapters: to the folders of mlx-lm, PEFT and vLLM, and merged into a whole checkpoint.

Writing: writings/fine_tuning.md.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.checkpoint.safetensors_file import LazyTensors
from moezoo.core.errors import SpecError
from moezoo.core.files import emptied_on_error
from moezoo.core.huggingface.adapters.naming import AdapterLayout
from moezoo.core.huggingface.adapters.write import write_adapter
from moezoo.core.huggingface.export import into_new_folder
from moezoo.core.parameters import Parameter, parameter_table
from moezoo.core.runs.base import own_weights
from moezoo.core.runs.open import OpenedModel, description_of, open_model
from moezoo.core.spec import ModelSpec


def convert_adapter(path: str | Path, out: Path, layout: AdapterLayout, adapter: str | Path | None = None) -> list[str]:
    """Write the adapter of a run as the folder of another tool, and return one-line notes for the user.

    Args:
        path: a run of an adapter; or the base of `adapter`.
        out: a new or empty folder.
        layout: of the folder.
        adapter: as in `open_model`.

    Raises what `open_model` raises. Raises SpecError: the run trained more than an adapter, or the layout has no place
    for a matrix. Raises RunError: `out` is not empty. After an error `out` is as it was.
    """
    opened = open_model(path, adapter=adapter)
    own = own_weights(opened.weights, str(path))
    spec = opened.config.model
    factors = {row.name for row in parameter_table(spec) if row.base is not None}
    others = [name for name in own if name not in factors]
    if others:
        raise SpecError(
            f"{opened.path} trained {others[0]} and {len(others) - 1} more parameters besides its adapter, which the "
            "folder of an adapter cannot have. Write a whole checkpoint: --merge."
        )
    assert spec.adapter is not None
    assert opened.base is not None
    adapter_spec, base, weights = spec.adapter, opened.base.path, {name: own[name] for name in own}

    def write(folder: Path) -> list[str]:
        return write_adapter(adapter_spec, weights, description_of(opened), base, layout, folder)

    with emptied_on_error(out):
        notes = into_new_folder(out, write)
    return [*opened.problems, *notes]


def merged(opened: OpenedModel) -> OpenedModel:
    """Return an opened model of an adapter as a whole one: its base with `W + scale A B` in place of each W.

    Raises CheckpointError: it has no adapter. Raises what `open_model` raises for the base.
    """
    own_weights(opened.weights, str(opened.path))
    assert opened.base is not None
    base, spec = open_model(opened.base.path), opened.config.model
    whole = spec.model_copy(update={"adapter": None})
    return replace(
        base,
        config=opened.config.model_copy(update={"model": whole, "init_from": None}),
        tokenizer=opened.tokenizer,
        weights=_Merged(spec, opened.weights),
        step=opened.step,
        problems=opened.problems,
    )


class _Merged(LazyTensors):
    """Parameters with their adapters merged, in the dtype of each; sums are in float32, and those of codes stay so."""

    def __init__(self, spec: ModelSpec, inner: Mapping[str, Any]):
        assert spec.adapter is not None
        self._rows = {row.name: row for row in parameter_table(spec)}
        super().__init__({name: row.shape for name, row in self._rows.items() if row.base is None})
        self._inner, self._scale = inner, spec.adapter.scale

    def __getitem__(self, name: str) -> Any:
        value = self._inner[name]
        if f"{name}.lora_a" not in self._rows:
            return value
        delta = self._scale * _product(
            self._rows[name], *(np.asarray(self._inner[f"{name}.{factor}"]) for factor in ("lora_a", "lora_b"))
        )
        return (np.asarray(value, np.float32) + delta).astype(value.dtype)

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """The dtype of each parameter, without reading it."""
        inner: Any = self._inner
        return {name: inner.dtypes[name] for name in self.shapes}


def _product(row: Parameter, lora_a: Any, lora_b: Any) -> Any:
    """Return A B in the shape of a matrix."""
    assert row.matrix is not None
    stack, rank = row.matrix.split(row.shape)[0], lora_a.shape[-1]
    return (lora_a.reshape(*stack, -1, rank) @ lora_b.reshape(*stack, rank, -1)).reshape(row.shape)
