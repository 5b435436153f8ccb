"""Arrays in and out: canonical names and NumPy on one side, MLX parameters on the other."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

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
        """A trainable parameter with this module's value of that name, float32."""
        return mx.array(np.asarray(self._values[self._prefix + name], np.float32))

    def state(self, name: str) -> mx.array:
        """State with this module's value of that name, float32; the module must freeze it: no gradients train it."""
        return self.parameter(name)


def to_numpy(values: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    """Arrays by name -> float32 NumPy arrays by name."""
    # Trap: NumPy has no bfloat16, so cast before crossing over.
    return {name: np.array(value.astype(mx.float32)) for name, value in values.items()}
