"""The parameters in which two models differ."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Model
from moezoo.core.parameters import parameter_table
from moezoo.core.progress import Progress
from moezoo.core.quantization.weight import QuantizedWeight, stored

_CHUNK_VALUES = 2**22


@dataclass(frozen=True)
class WeightDifference:
    """Parameters that differ between two models, in the order of the parameter table.

    Fields:
        equal: number of parameters with the same values, after decoding.
        differing: name and relative difference `|b - a| / |a|` (Euclidean norms) of the others; infinite for another
            shape or values that are not finite.
        only_a, only_b: names of parameters that only one model has.
        codes_a, codes_b: number of parameters that each model computes with as codes (quantized).
        same_codes: the same parameters are codes in both.
    """

    equal: int
    differing: tuple[tuple[str, float], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    codes_a: int
    codes_b: int
    same_codes: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters that are not the same."""
        return (*(name for name, _ in self.differing), *self.only_a, *self.only_b)


def weight_difference(a: Model, b: Model, on_progress: Progress) -> WeightDifference:
    """Compare the parameters of two models one at a time."""
    names_a, names_b = ([row.name for row in parameter_table(model.spec)] for model in (a, b))
    known_a, known_b = set(names_a), set(names_b)
    common = [name for name in names_a if name in known_b]
    codes_a, codes_b = set[str](), set[str]()
    differing, equal = list[tuple[str, float]](), 0
    for number, name in enumerate(common):
        on_progress("comparing weights", number, len(common))
        value_a, value_b = _exported(a, name, codes_a), _exported(b, name, codes_b)
        found = _relative(value_a, value_b)
        equal += found == 0
        differing += [(name, found)] if found else []
    return WeightDifference(
        equal=equal,
        differing=tuple(differing),
        only_a=tuple(name for name in names_a if name not in known_b),
        only_b=tuple(name for name in names_b if name not in known_a),
        codes_a=len(codes_a),
        codes_b=len(codes_b),
        same_codes=codes_a == codes_b,
    )


def _exported(model: Model, name: str, codes: set[str]) -> NDArray[np.floating]:
    """Return a parameter of a model; its name is added to `codes` if the model has it so."""
    value = stored(model.export_parameters({name}), name)
    if isinstance(value, QuantizedWeight):
        codes.add(name)
        return value.values()
    return value


def _relative(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Return the relative difference; 0 only for equal values."""
    if a.shape != b.shape:
        return math.inf
    flat_a, flat_b, squares, differ = a.reshape(-1), b.reshape(-1), np.zeros(2), False
    for first in range(0, len(flat_a), _CHUNK_VALUES):
        left, right = (flat[first : first + _CHUNK_VALUES].astype(np.float64) for flat in (flat_a, flat_b))
        differ = differ or not np.array_equal(left, right)
        squares += np.sum((right - left) ** 2), np.sum(left**2)
    if not differ:
        return 0.0
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] and np.isfinite(squares).all() else math.inf
