"""A ModelSpec as values by path, layer by layer, and the differences of two of them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from moezoo.core.spec import LayerSpec, ModelSpec

# Spec fields that only affect training, by field name: checkpoints of a family do not contain them.
TRAINING_ONLY = frozenset(
    ("losses", "jitter", "rate", "dispatch", "loss_coefficient", "dropout", "initializer", "precision")
)

Values = Mapping[str, Any]

_NOTHING = object()
_EVERYTHING = 1 << 40  # of models with unequal numbers of layers, more than any other difference


@dataclass(frozen=True)
class Leaves:
    """The values of a spec: of the model, and of each of its layers, by dotted path."""

    model: Values
    layers: tuple[Values, ...]

    def of(self, path: str) -> list[Any]:
        """Return the different values at a path, in the model or in any layer."""
        found = [values[path] for values in (self.model, *_once(self.layers)) if path in values]
        return list(dict.fromkeys(found))


class Distance(NamedTuple):
    """Size of a difference: of what is computed, and of what only training needs."""

    computed: int
    trained: int


class Difference(NamedTuple):
    """One value that differs: its path in the config, the value there (`here`), and that of a family (`there`).

    A part that only one of them has is one difference, by its kind.
    """

    path: str
    here: Any
    there: Any


PRESENT = "{...}"
"""In place of the value of a part without a kind, where the other model has none."""


def leaves_of(spec: ModelSpec) -> Leaves:
    """Return the values of a spec."""
    layers: list[Values] = []
    for layer in spec.layers:
        layers += [_layer_values(layer if layer.repeat == 1 else layer.model_copy(update={"repeat": 1}))] * layer.repeat
    model = dict(_flat(spec.model_dump(exclude={"layers", "adapter"}), ""))
    return Leaves(model | {"number of layers": len(layers)}, tuple(layers))


@lru_cache(maxsize=4096)
def _layer_values(layer: LayerSpec) -> Values:
    return dict(_flat(layer.model_dump(exclude={"repeat"}), ""))


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}[{index}]")
    else:
        yield path, tuple(value) if isinstance(value, list) else value


def distance(found: Leaves, wanted: Leaves) -> Distance:
    """Return how far two models are apart; a part that only one of them has counts more than another number in it."""
    pairs: dict[tuple[int, int], list[Any]] = {}
    for ours, theirs in zip(found.layers, wanted.layers, strict=False):
        pairs.setdefault((id(ours), id(theirs)), [ours, theirs, 0])[2] += 1
    computed = trained = 0
    if len(found.layers) != len(wanted.layers):
        computed = _EVERYTHING
    for ours, theirs, count in ((found.model, wanted.model, 1), *pairs.values()):
        for path in _paths(ours, theirs):
            cost = _cost(ours.get(path, _NOTHING), theirs.get(path, _NOTHING))
            if cost and is_trained(path):
                trained += count * cost
            else:
                computed += count * cost
    return Distance(computed, trained)


def layer_distances(found: Leaves, wanted: Leaves) -> list[int]:
    """Return how far each layer is from the one that is wanted."""
    costs: dict[tuple[int, int], int] = {}  # of equal layers once
    for ours, theirs in zip(found.layers, wanted.layers, strict=False):
        if (pair := (id(ours), id(theirs))) not in costs:
            costs[pair] = sum(
                _cost(ours.get(path, _NOTHING), theirs.get(path, _NOTHING)) for path in _paths(ours, theirs)
            )
    return [costs[id(ours), id(theirs)] for ours, theirs in zip(found.layers, wanted.layers, strict=False)]


def _cost(ours: Any, theirs: Any) -> int:
    if ours == theirs:
        return 0
    return 1 if type(ours) is type(theirs) else 2


@lru_cache(maxsize=4096)
def is_trained(path: str) -> bool:
    """Return True for the path of a value that only affects training."""
    return not TRAINING_ONLY.isdisjoint(part.partition("[")[0] for part in path.split("."))


def changed(before: Leaves, after: Leaves) -> dict[str, tuple[Any, Any]]:
    """Return the paths whose value differs anywhere, with the value before and after in the first such place."""
    found: dict[str, tuple[Any, Any]] = {}
    seen: set[tuple[int, int]] = set()
    for ours, theirs in ((before.model, after.model), *zip(before.layers, after.layers, strict=False)):
        if ours is theirs or (id(ours), id(theirs)) in seen:
            continue
        seen.add((id(ours), id(theirs)))
        for path in _paths(ours, theirs):
            pair = (ours.get(path), theirs.get(path))
            if pair[0] != pair[1] and path not in found:
                found[path] = pair
    return found


def differing(found: Leaves, wanted: Leaves) -> set[str]:
    """Return the paths whose value differs in the model or in any layer."""
    return set(changed(found, wanted))


def differences(found: Leaves, wanted: Leaves) -> list[Difference]:
    """Return the differences in what is computed, each part or value once, with the first layer that has it."""
    named: dict[str, Difference] = {}
    places = [("", found.model, wanted.model)]
    places += [
        (f"layers[{index}].", *pair) for index, pair in enumerate(zip(found.layers, wanted.layers, strict=False))
    ]
    for prefix, theirs, ours in places:
        for path in (*ours, *(path for path in theirs if path not in ours)):
            if ours.get(path, _NOTHING) != theirs.get(path, _NOTHING) and not is_trained(path):
                part = _part(path, ours, theirs)
                difference = Difference(f"model.{prefix}{part}", _named(ours, part), _named(theirs, part))
                named.setdefault(part, difference)
    return list(named.values())


def _part(path: str, ours: Values, theirs: Values) -> str:
    """Return the outermost part around a path that only one of the models has, or that is of another kind; or it."""
    words = path.split(".")
    for count in range(1, len(words)):
        part = ".".join(words[:count])
        kind = f"{part}.kind"
        if (part in ours) != (part in theirs) or ours.get(kind, _NOTHING) != theirs.get(kind, _NOTHING):
            return part
    return path


def _named(values: Values, part: str) -> Any:
    """Return the value at a path, or the kind of the part there."""
    if part in values:
        return values[part]
    inside = [path for path in values if path.startswith((f"{part}.", f"{part}["))]
    return values.get(f"{part}.kind", PRESENT if inside else None)


def _paths(ours: Values, theirs: Values) -> Iterable[str]:
    return ours if ours.keys() == theirs.keys() else dict.fromkeys((*ours, *theirs))


def _once(layers: tuple[Values, ...]) -> list[Values]:
    return list({id(values): values for values in layers}.values())
