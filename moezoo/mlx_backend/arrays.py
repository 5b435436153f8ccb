"""Conversion between NumPy arrays by canonical name and MLX parameters."""

from collections.abc import Mapping
from typing import Any, cast

import ml_dtypes
import mlx.core as mx
import numpy as np

from moezoo.core.parameters.precision import STORED_DTYPES
from moezoo.core.quantization.weight import QuantizedWeight, stored
from moezoo.core.spec import AdapterSpec
from moezoo.mlx_backend.adapter import BASE, Adapted
from moezoo.mlx_backend.quantization import quantized_array
from moezoo.mlx_backend.runtime.typed import flatten

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


class Weights:
    """Parameter values by canonical name, as seen by one module: `inside("experts")` is the view of a sub-module."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "", adapter: AdapterSpec | None = None):
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

    def parameter(self, name: str) -> mx.array:
        """Return a trainable parameter with this module's value of that name, in its own dtype: every use casts it.

        Trap: a matrix may be a QuantizedArray, for `projection.einsum`, grouped products, `take` and `as_array`. It is
        no `mx.array`, so a module's `parameters()` lack it, and no gradient is computed. With an adapter it is Adapted.
        """
        if self.has(f"{name}.lora_a"):
            assert self._adapter is not None
            lora_a, lora_b = (self._factor(f"{name}.{factor}") for factor in ("lora_a", "lora_b"))
            return cast(mx.array, Adapted(self._plain(name), lora_a, lora_b, self._adapter))
        return self._plain(name)

    def _plain(self, name: str) -> mx.array:
        given = stored(self._values, self._prefix + name)
        if isinstance(given, QuantizedWeight) and len(given.shape) > 1:
            return cast(mx.array, quantized_array(given))
        value = given.values() if isinstance(given, QuantizedWeight) else np.asarray(given)
        if value.dtype == ml_dtypes.bfloat16:
            return mx.array(value.view(np.uint16)).view(mx.bfloat16)
        return mx.array(value if value.dtype.name in STORED_DTYPES else value.astype(np.float32))

    def _factor(self, name: str) -> mx.array:
        """Return a factor of an adapter in float32: no use casts it before it is multiplied with the scale."""
        return mx.array(np.asarray(self._values[self._prefix + name], np.float32))

    def state(self, name: str) -> mx.array:
        """Return state with this module's value of that name, in its own dtype; the module must freeze it."""
        return self.parameter(name)


def canonical_name(path: str) -> str:
    """Return the canonical name of the parameter at a path of a module."""
    return path.removesuffix(BASE)


def named(tree: Any) -> dict[str, mx.array]:
    """Return the arrays of a tree of parameters or gradients by canonical name."""
    return {canonical_name(path): value for path, value in flatten(tree)}


def to_numpy(values: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    """Convert arrays by name to float32 NumPy arrays by name."""
    # Trap: NumPy has no bfloat16, so cast before the conversion.
    return {name: np.array(value.astype(mx.float32)) for name, value in values.items()}


def exported(values: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    """Convert arrays by name to NumPy arrays of their own dtype by name: read-only views of the same memory."""
    views = {}
    for name, value in values.items():
        bfloat16 = value.dtype == mx.bfloat16
        view = np.asarray(value.view(mx.uint16) if bfloat16 else value)
        view.flags.writeable = False
        views[name] = view.view(ml_dtypes.bfloat16) if bfloat16 else view
    return views
