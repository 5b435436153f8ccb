"""Conversion between NumPy arrays by canonical name and NNX parameters."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.core.parameters.precision import STORED_DTYPES
from moezoo.core.quantization.weight import QuantizedWeight, stored
from moezoo.jax_backend.quantization import QuantizedArray, quantized_array
from moezoo.jax_backend.runtime.processes import on_host

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class _State(nnx.Variable[jax.Array]):
    """State that a step updates without gradients."""


class Weights:
    """Parameter values by canonical name, as seen by one module: `inside("experts")` is the view of a sub-module."""

    def __init__(self, values: Mapping[str, np.ndarray], prefix: str = ""):
        self._values, self._prefix = values, prefix

    def inside(self, name: str) -> "Weights":
        """Return the view of a sub-module."""
        return Weights(self._values, f"{self._prefix}{name}.")

    def has(self, name: str) -> bool:
        """Return True if this module has a parameter of that name."""
        return self._prefix + name in self._values

    def parameter(self, name: str) -> nnx.Param[jax.Array]:
        """Return a trainable parameter with this module's value of that name, in its own dtype: every use casts it.

        What is stored as codes is a QuantizedArray in place of an array.
        """
        value = stored(self._values, self._prefix + name)
        if isinstance(value, QuantizedWeight):
            return nnx.Param(cast(jax.Array, quantized_array(value)))
        return nnx.Param(_array(value))

    def state(self, name: str) -> nnx.Variable[jax.Array]:
        """Return state with this module's value of that name, in its own dtype: not trained by gradients."""
        return _State(_array(self._values[self._prefix + name]))


def _array(given: Any) -> jax.Array:
    if isinstance(given, jax.Array | jax.ShapeDtypeStruct):  # on its devices already, or planned: sharding.py
        return cast(jax.Array, given)
    value = np.asarray(given)
    return jnp.asarray(value, value.dtype if value.dtype.name in STORED_DTYPES else jnp.float32)


def to_numpy(values: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Convert arrays by name to float32 NumPy arrays by name."""
    return {name: np.asarray(on_host(value), np.float32) for name, value in values.items()}


def exported(values: Mapping[str, jax.Array | QuantizedArray]) -> dict[str, np.ndarray]:
    """Convert arrays by name to NumPy arrays of their own dtype by name; codes are left out."""
    return {name: np.asarray(on_host(value)) for name, value in values.items() if not isinstance(value, QuantizedArray)}
