"""Arrays in and out: canonical names and NumPy on one side, MLX parameters on the other."""

from collections.abc import Mapping

import ml_dtypes
import mlx.core as mx
import numpy as np

from moezoo.core.parameters.precision import STORED_DTYPES

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


class Weights:
    """Values by canonical name, seen from one module: `inside("experts")` is the view of the sub-module `experts`."""

    def __init__(self, values: Mapping[str, np.ndarray], prefix: str = ""):
        self._values, self._prefix = values, prefix

    def inside(self, name: str) -> "Weights":
        """The view of a sub-module."""
        return Weights(self._values, f"{self._prefix}{name}.")

    def has(self, name: str) -> bool:
        """Whether this module has a parameter of that name."""
        return self._prefix + name in self._values

    def parameter(self, name: str) -> mx.array:
        """A trainable parameter with this module's value of that name, in its own dtype: every use of it casts."""
        value = np.asarray(self._values[self._prefix + name])
        if value.dtype == ml_dtypes.bfloat16:
            return mx.array(value.view(np.uint16)).view(mx.bfloat16)
        return mx.array(value if value.dtype.name in STORED_DTYPES else value.astype(np.float32))

    def state(self, name: str) -> mx.array:
        """State with this module's value of that name, in its own dtype; the module must freeze it: no gradients."""
        return self.parameter(name)


def to_numpy(values: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    """Arrays by name -> float32 NumPy arrays by name."""
    # Trap: NumPy has no bfloat16, so cast before crossing over.
    return {name: np.array(value.astype(mx.float32)) for name, value in values.items()}


def exported(values: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    """Arrays by name -> NumPy arrays of their own dtype by name, views of the same memory that cannot be written."""
    views = {}
    for name, value in values.items():
        bfloat16 = value.dtype == mx.bfloat16
        view = np.asarray(value.view(mx.uint16) if bfloat16 else value)
        view.flags.writeable = False
        views[name] = view.view(ml_dtypes.bfloat16) if bfloat16 else view
    return views
