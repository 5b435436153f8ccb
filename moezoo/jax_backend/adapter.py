"""Low-rank adapters of matrices. Spec: moezoo.core.reference.adapter."""

from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.random import ADAPTER_DROPOUT
from moezoo.core.reference.adapter import number_of
from moezoo.core.spec import AdapterSpec
from moezoo.jax_backend import quantization
from moezoo.jax_backend.quantization import QuantizedArray
from moezoo.jax_backend.random import fold_in, uniform

Module = TypeVar("Module", bound=nnx.Module)

BASE = ".base"
"""End of the attribute path of a matrix that has an adapter; its canonical name lacks it."""


@dataclass(frozen=True)
class AdaptedArray:
    """Spec: moezoo.core.reference.adapter.AdaptedArray; the matrix may be codes."""

    base: jax.Array | QuantizedArray
    lora_a: jax.Array
    lora_b: jax.Array
    scale: float
    dropout: float
    key: jax.Array | None

    def astype(self, dtype: Any) -> "AdaptedArray":
        """Return the same matrix with all its arrays in another dtype; codes are decoded to it."""
        base = self.base.astype(dtype)
        return replace(self, base=base, lora_a=self.lora_a.astype(dtype), lora_b=self.lora_b.astype(dtype))

    @property
    def scaled_b(self) -> jax.Array:
        """The second factor times the scale."""
        return self.lora_b * self.scale

    def dropped(self, x: jax.Array) -> jax.Array:
        """Return the input of the adapter: x after dropout, if there is a key."""
        if self.dropout == 0 or self.key is None:
            return x
        return jnp.where(uniform(self.key, x.shape) >= self.dropout, x / (1 - self.dropout), 0).astype(x.dtype)


class Adapted(nnx.Module):
    """A parameter that is a matrix with an adapter, in place of the parameter."""

    def __init__(self, base: Any, lora_a: Any, lora_b: Any, spec: AdapterSpec):
        self.base, self.lora_a, self.lora_b = base, lora_a, lora_b
        self.spec = spec
        self.key: nnx.Variable[jax.Array] | None = nnx.data(None)

    def __getitem__(self, index: EllipsisType) -> AdaptedArray:
        """Return the AdaptedArray, for `...`."""
        key = None if self.key is None else self.key[...]
        scale, dropout = self.spec.scale, self.spec.dropout
        return AdaptedArray(self.base[...], self.lora_a[...], self.lora_b[...], scale, dropout, key)

    def astype(self, dtype: Any) -> AdaptedArray:
        """Return the AdaptedArray in another dtype."""
        return self[...].astype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        shape: tuple[int, ...] = self.base.shape
        return shape


def held(parameter: Any) -> Any:
    """Return what a parameter holds: an array, codes, or an AdaptedArray."""
    return parameter[...]


class _Key(nnx.Variable[jax.Array]):
    """Key of an adapter's dropout."""


def take(weight: jax.Array | QuantizedArray | AdaptedArray, index: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.adapter.take; of codes only the rows with these indices are decoded.

    In the weight's dtype; with an adapter, in float32.
    """
    if not isinstance(weight, AdaptedArray):
        return quantization.take(weight, index)
    return quantization.take(weight.base, index) + weight.lora_a[index] @ weight.scaled_b


def keyed(spec: AdapterSpec | None, module: Module, name: str, key: jax.Array | None) -> Module:
    """Return the module with a key for the dropout of each of its adapters, if they have any.

    `name`: of the module in its layer; `key`: of the layer, or None. Spec: moezoo.core.reference.adapter.adapted.
    """
    if spec is None or spec.dropout == 0 or key is None:
        return module
    own = nnx.clone(module)
    for path, inner in nnx.iter_modules(own):
        if isinstance(inner, Adapted):
            number = number_of(".".join([name, *map(str, path)]))
            inner.key = _Key(fold_in(key, ADAPTER_DROPOUT, number))
    return own
