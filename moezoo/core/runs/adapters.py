"""An adapter in the place of another one of the same model, so that both can be switched."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Floats


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
