"""An adapter in the place of another one of the same model, so that both can be switched."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.backend import Model
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.runs.base import Base, own_weights
from moezoo.core.runs.open import open_model
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Floats


class AdapterSwitch:
    """Adapters for one base, of which a model has one at a time; "default" is the one that it was built with."""

    def __init__(self, model: Model, base: Base | None):
        self._model, self._base = model, base
        self._loaded: dict[str, dict[str, Floats]] = {}

    def load(self, path: str | Path, name: str) -> None:
        """Read another adapter. Raises SpecError: the model has none, or it does not fit into that one's place."""
        if self._base is None:
            raise SpecError(
                f"the model has no adapter, in whose place that of {path} could be; expected one. Load it with "
                "moezoo.load(BASE, adapter=...)."
            )
        opened = open_model(self._base.path, adapter=path)
        own = own_weights(opened.weights, str(path))
        self._keep_first()
        self._loaded[name] = fitted(own, opened.config.model, self._model.spec, str(path))

    def set(self, name: str | None) -> None:
        """Switch to the adapter of that name; None: to the base. Raises SpecError: there is none of that name."""
        self._keep_first()
        if name is not None and name not in self._loaded:
            known = ", ".join(self._loaded) or "none"
            raise SpecError(f"unknown adapter {name!r:.80}; expected one of {known}. Load it with load_adapter.")
        first = self._loaded["default"]
        no_adapter = {key: np.zeros_like(value) for key, value in first.items()}
        self._model.set_parameters(no_adapter if name is None else self._loaded[name])

    def _keep_first(self) -> None:
        if "default" not in self._loaded:
            names = {row.name for row in parameter_table(self._model.spec) if row.base is not None}
            exported = self._model.export_parameters(names)
            self._loaded["default"] = {name: np.array(value) for name, value in exported.items()}


def fitted(own: Mapping[str, Any], spec: ModelSpec, target: ModelSpec, where: str) -> dict[str, Floats]:
    """Return factors of one adapter in the shapes of another, with the same products.

    Args:
        own: factors by canonical name.
        spec: the model with the adapter that they are of.
        target: the model with the other adapter, whose rank may be larger, and which may be on more matrices.
        where: names the first in errors.

    Raises SpecError: the adapter is on a matrix that the other is not on, or has a larger rank, or is not all of `own`.
    """
    assert spec.adapter is not None
    assert target.adapter is not None
    rows = {row.name: row for row in parameter_table(target) if row.base is not None}
    outside = [name for name in own if name not in rows]
    if outside or spec.adapter.rank > target.adapter.rank:
        problem = f"has {outside[0]}" if outside else f"has rank {spec.adapter.rank}"
        raise SpecError(
            f"the adapter of {where} {problem}, for which the adapter that the model was loaded with has no place; "
            f"expected rank <= {target.adapter.rank} and the same matrices. Load the model with the larger one first."
        )
    found: dict[str, Floats] = {}
    for name, row in rows.items():
        value = np.zeros(row.shape, np.float32)
        if name in own:
            axis = row.axes.index("rank")
            part = np.moveaxis(value, axis, 0)[: spec.adapter.rank]
            part[...] = np.moveaxis(np.asarray(own[name], np.float32), axis, 0)
            if name.endswith("lora_b"):
                part *= np.float32(spec.adapter.scale / target.adapter.scale)
        found[name] = value
    return found
