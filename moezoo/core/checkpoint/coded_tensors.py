"""Arrays of a model of which some are codes on its device."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import LazyTensors
from moezoo.core.quantization.weight import QuantizedWeight

Array = npt.NDArray[Any]


class CodedTensors(LazyTensors):
    """Arrays by name: those in codes are decoded when they are accessed, one at a time; `stored` returns their codes.

    Fields:
        dtypes: dtype by name, known without decoding.

    `codes` are a backend's arrays in codes, which have a shape, and `weight_of` makes NumPy arrays of one.
    """

    def __init__(
        self, arrays: Mapping[str, Array], codes: Mapping[str, Any], weight_of: Callable[[Any], QuantizedWeight]
    ):
        shapes = {name: array.shape for name, array in arrays.items()}
        super().__init__(shapes | {name: value.shape for name, value in codes.items()})
        self._arrays, self._codes, self._weight_of = arrays, codes, weight_of
        self.dtypes = {name: array.dtype for name, array in arrays.items()} | dict.fromkeys(codes, np.dtype(np.float32))

    def __getitem__(self, name: str) -> Array:
        value = self.stored(name)
        return value.values() if isinstance(value, QuantizedWeight) else value

    def stored(self, name: str) -> Array | QuantizedWeight:
        return self._weight_of(self._codes[name]) if name in self._codes else self._arrays[name]

    def stored_bytes(self, name: str) -> int | None:
        return self._weight_of(self._codes[name]).nbytes if name in self._codes else None
