"""Simple maps from a field of a config.json to a value of the spec, found from two points, and their inverse."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from moezoo.core.huggingface.inverse.leaves import Leaves
from moezoo.core.huggingface.inverse.reads import Read

Inverse = Callable[[Any], Any]
"""Returns the value of the field from which a value of the spec follows, or None."""


def unknown(value: Any) -> None:
    """Return None: the inverse where the map is not a simple one."""


def same(value: Any) -> Any:
    """Return a number itself: the inverse where the field is the value."""
    return value if is_number(value) else None


def probes(read: Read, value: Any) -> list[Any]:
    """Return other values of a field, of which one should be possible."""
    if read.options:
        return [option for option in read.options if option != value]
    if read.kind in ("per layer", "layers", "object"):
        return []
    if isinstance(value, list | dict):
        return []
    if read.kind == "number" or isinstance(value, float):
        return [2 * (value or 0.0) or 0.25, (value or 0.0) / 2 or 0.5]
    if not is_number(value):
        return [64, 16, 2, 1.5] if read.kind == "json" else [64, 16, 2, 1]
    return [2 * value, value + 1, value // 2, 1, 2]


def inverse_of(value: Any, probe: Any, old: Any, new: Any) -> Inverse | None:
    """Return the inverse of the simple map from a field to a value of the spec that two points of it show."""
    if not is_number(probe):
        return lambda wanted: probe if wanted == new else value if wanted == old else None
    if not is_number(new):
        return None
    if probe == new and (not is_number(value) or value == old or old is None):
        return same
    if not (is_number(value) and is_number(old) and value):
        return None
    if math.isclose(old * probe, new * value):
        return lambda wanted: wanted * value / old if is_number(wanted) else None
    if math.isclose(old * value, new * probe):
        return lambda wanted: old * value / wanted if is_number(wanted) and wanted else None
    if old - value == new - probe:
        return lambda wanted: wanted - (old - value) if is_number(wanted) else None
    return None


def is_number(value: Any) -> bool:
    """Return True for an integer or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def edges_of(wanted: Leaves) -> list[int]:
    """Return integers that a pattern of layers may have: where kinds of layer change, and the distances of these."""
    layers = wanted.layers
    found = [0, 1, len(layers)]
    for kind in dict.fromkeys(id(values) for values in layers):
        places = [index for index, values in enumerate(layers) if id(values) == kind]
        gaps = [later - earlier for earlier, later in pairwise(places) if later - earlier > 1]
        found += [places[0], places[-1] + 1, len(layers) - places[-1] - 1, *gaps[:2]]
    changes = [index for index in range(1, len(layers)) if layers[index] is not layers[index - 1]]
    found += [*changes[:3], *changes[-2:]]
    return list(dict.fromkeys(found))
