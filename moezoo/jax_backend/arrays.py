"""Conversion between NumPy arrays by canonical name and NNX parameters."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.core.parameters.precision import STORED_DTYPES
from moezoo.core.quantization.weight import QuantizedWeight, stored
from moezoo.core.spec import AdapterSpec
from moezoo.jax_backend.adapter import BASE, Adapted
from moezoo.jax_backend.quantization import QuantizedArray, quantized_array
from moezoo.jax_backend.runtime.processes import on_host

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class _State(nnx.Variable[jax.Array]):
    """State that a step updates without gradients."""


class Weights:
    """Parameter values by canonical name, as seen by one module: `inside("experts")` is the view of a sub-module."""

    def __init__(self, values: Mapping[str, np.ndarray], prefix: str = "", adapter: AdapterSpec | None = None):
        self._values, self._prefix, self._adapter = values, prefix, adapter

    def inside(self, name: str) -> "Weights":
        """Return the view of a sub-module."""
        return Weights(self._values, f"{self._prefix}{name}.", self._adapter)

    def adapted_by(self, adapter: AdapterSpec | None) -> "Weights":
        """Return the same view, of a model with this adapter."""
        return Weights(self._values, self._prefix, adapter)

    def has(self, name: str) -> bool:
        """Return True if this module has a parameter of that name."""
        return self._prefix + name in self._values

    def parameter(self, name: str) -> nnx.Param[jax.Array]:
        """Return a trainable parameter with this module's value of that name, in its own dtype: every use casts it.

        What is stored as codes is a QuantizedArray in place of an array, and a matrix with an adapter is Adapted.
        """
        if self.has(f"{name}.lora_a"):
            assert self._adapter is not None
            lora_a, lora_b = (self._factor(f"{name}.{factor}") for factor in ("lora_a", "lora_b"))
            return cast(nnx.Param[jax.Array], Adapted(self._plain(name), lora_a, lora_b, self._adapter))
        return self._plain(name)

    def _plain(self, name: str) -> nnx.Param[jax.Array]:
        value = stored(self._values, self._prefix + name)
        if isinstance(value, QuantizedWeight):
            return nnx.Param(cast(jax.Array, quantized_array(value)))
        return nnx.Param(_array(value))

    def _factor(self, name: str) -> nnx.Param[jax.Array]:
        """Return a factor of an adapter in float32: no use casts it before it is multiplied with the scale."""
        value: Any = self._values[self._prefix + name]
        return nnx.Param(_array(value.astype(np.float32) if isinstance(value, np.ndarray) else value))

    def state(self, name: str) -> nnx.Variable[jax.Array]:
        """Return state with this module's value of that name, in its own dtype: not trained by gradients."""
        return _State(_array(self._values[self._prefix + name]))


def canonical_name(path: Iterable[Any]) -> str:
    """Return the canonical name of the parameter at a path of a tree's keys."""
    return ".".join(str(key.key) for key in path).removesuffix(BASE)


def named(tree: Any) -> dict[str, Any]:
    """Return the arrays and codes of a tree of parameters or gradients by canonical name, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(tree), is_leaf=_is_codes)
    return {canonical_name(path): value for path, value in leaves}


def _is_codes(value: object) -> bool:
    return isinstance(value, QuantizedArray)


def _array(given: Any) -> jax.Array:
    if isinstance(given, jax.Array | jax.ShapeDtypeStruct | QuantizedArray):  # there already, or planned: sharding.py
        return cast(jax.Array, given)
    value = np.asarray(given)
    return jnp.asarray(value, value.dtype if value.dtype.name in STORED_DTYPES else jnp.float32)


def to_numpy(values: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Convert arrays by name to float32 NumPy arrays by name."""
    return {name: np.asarray(on_host(value), np.float32) for name, value in values.items()}


def exported(values: Mapping[str, jax.Array | QuantizedArray]) -> dict[str, np.ndarray]:
    """Convert arrays by name to NumPy arrays of their own dtype by name; codes are left out."""
    return {name: np.asarray(on_host(value)) for name, value in values.items() if not isinstance(value, QuantizedArray)}
