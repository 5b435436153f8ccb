"""Differences of the named intermediates of two models that use the same experts, and the first one that differs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Output
from moezoo.core.layer_routing import LayerRouting
from moezoo.core.tokens import Floats

# Intermediates of a layer in the order of the forward pass, each with the part of the model that computes it.
PARTS = {
    "ngram_embeddings": "n-gram embeddings",
    "attention": "attention",
    "moe.router.logits": "router",
    "moe.router.weight": "combine weights",
    "moe.routed": "experts",
    "moe": "shared experts",
    "feed_forward": "dense feed-forward",
    "layer_input": "input of the layer",
    "": "residual stream",
}
_OUTSIDE = {"embedding": -1, "final_norm": 1, "logits": 2}  # before or after all layers
_LAYER = re.compile(r"layers\.(\d+)\.?(.*)")


@dataclass(frozen=True)
class PartDifference:
    """Difference of an intermediate over all tokens.

    Fields:
        name: of the intermediate, e.g. `layers.2.moe.routed`.
        layer: its layer; None outside of the layers.
        part: a value of PARTS; outside of the layers the name.
        relative: root mean square of the difference over that of the left side; infinite if a value is not finite.
        not_finite: the models, of `A` and `B`, that have a value that is not finite.
    """

    name: str
    layer: int | None
    part: str
    relative: float
    not_finite: str = ""


class IntermediateDifferences:
    """Sums over the tokens so far."""

    def __init__(self) -> None:
        self._squares: dict[str, NDArray[np.float64]] = {}

    def add(self, left: Output, right: Output, counted_P: NDArray[np.bool_]) -> None:
        """Add the tokens `counted_P` of two outputs: the intermediates that both have, with the same shape."""
        a, b = _values(left), _values(right)
        for name in a.keys() & b.keys():
            if a[name].shape == b[name].shape:
                a_PD, b_PD = (value.reshape(len(counted_P), -1)[counted_P] for value in (a[name], b[name]))
                with np.errstate(invalid="ignore", over="ignore"):  # of models that are not finite
                    sums = np.array([_square(b_PD - a_PD), _square(a_PD), _square(b_PD)])
                self._squares[name] = self._squares.get(name, np.zeros(3)) + sums

    def differences(self) -> tuple[PartDifference, ...]:
        """Return the differences in the order of the forward pass."""
        return tuple(_difference(name, *self._squares[name]) for name in sorted(self._squares, key=_place))


def _values(output: Output) -> Mapping[str, Floats]:
    """Return all intermediates; combine weights in the order of the experts' ids, since the slots may be in any."""
    weights = {f"layers.{routing.layer}.moe.router.weight": _by_expert(routing) for routing in output.routing}
    return {**output.intermediates, **weights}


def _by_expert(routing: LayerRouting) -> Floats:
    return np.take_along_axis(routing.weight, np.argsort(routing.expert, axis=-1, kind="stable"), axis=-1)


def _square(values: Floats) -> float:
    return float(np.square(values, dtype=np.float64).sum())  # a BLAS product of this size waits for its threads


def _difference(name: str, difference: float, size: float, size_b: float) -> PartDifference:
    relative = np.sqrt(difference / size) if size and np.isfinite((difference, size)).all() else np.inf
    found = _LAYER.fullmatch(name)
    layer, part = (None, name) if found is None else (int(found[1]), PARTS.get(found[2], found[2]))
    not_finite = "".join(model for model, own in (("A", size), ("B", size_b)) if not np.isfinite(own))
    return PartDifference(name, layer, part, 0.0 if difference == 0 else float(relative), not_finite)


def _place(name: str) -> tuple[int, int, int]:
    """Return the place of an intermediate in the forward pass, to sort by."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return _OUTSIDE.get(name, 0), 0, 0
    names: Sequence[str] = list(PARTS)
    return 0, int(found[1]), names.index(found[2]) if found[2] in PARTS else len(names)
