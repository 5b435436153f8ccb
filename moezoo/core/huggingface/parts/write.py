"""Export to config.json: the older spellings that mlx-lm reads."""

from collections.abc import Mapping
from typing import Any

from moezoo.core.spec import ModelSpec


def older_spellings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of transformers 4, which mlx-lm reads, for those that a config has in version 5's spelling only."""
    found: dict[str, Any] = {}
    inner = raw.get("rope_parameters")
    if isinstance(inner, Mapping) and not any(isinstance(value, Mapping) for value in inner.values()):
        kind = inner.get("rope_type", inner.get("type", "default"))
        found["rope_theta"] = inner.get("rope_theta")
        if "partial_rotary_factor" in inner:
            found["partial_rotary_factor"] = inner["partial_rotary_factor"]
        moved = {key: value for key, value in inner.items() if key not in found} | {"type": kind, "rope_type": kind}
        found["rope_scaling"] = None if kind == "default" else moved
    elif "rope_theta" in raw and inner is None:
        found["rope_scaling"] = None
    for new, old in (("num_local_experts", "num_experts"), ("dtype", "torch_dtype")):
        if new in raw:
            found[old] = raw[new]
    return {key: value for key, value in found.items() if key not in raw}


def leading_dense(spec: ModelSpec) -> int:
    """Return the number of dense layers before the first MoE layer: `first_k_dense_replace`."""
    return spec.moes[0][0] if spec.moes else len(spec.all_layers)
