"""Low-rank adapters of matrices. Spec: moezoo.core.reference.adapter."""

from copy import copy
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, TypeVar

import mlx.core as mx
from mlx import nn

from moezoo.core.random import ADAPTER_DROPOUT
from moezoo.core.reference.adapter import number_of
from moezoo.core.spec import AdapterSpec
from moezoo.mlx_backend import quantization
from moezoo.mlx_backend.quantization import QuantizedArray
from moezoo.mlx_backend.random import fold_in, uniform

Module = TypeVar("Module", bound=nn.Module)

BASE = ".base"
"""End of the attribute path of a matrix that has an adapter; its canonical name lacks it."""


@dataclass(frozen=True)
class AdaptedArray:
    """Spec: moezoo.core.reference.adapter.AdaptedArray; the matrix may be codes."""

    base: mx.array | QuantizedArray
    lora_a: mx.array
    lora_b: mx.array
    scale: float
    dropout: float
    key: mx.array | None

    def astype(self, dtype: Any) -> "AdaptedArray":
        """Return the same matrix with all its arrays in another dtype; codes are decoded to it."""
        base = self.base.astype(dtype)
        return replace(self, base=base, lora_a=self.lora_a.astype(dtype), lora_b=self.lora_b.astype(dtype))

    @property
    def scaled_b(self) -> mx.array:
        """The second factor times the scale."""
        return self.lora_b * self.scale

    def dropped(self, x: mx.array) -> mx.array:
        """Return the input of the adapter: x after dropout, if there is a key."""
        if self.dropout == 0 or self.key is None:
            return x
        return mx.where(uniform(self.key, x.shape) >= self.dropout, x / (1 - self.dropout), 0).astype(x.dtype)


class Adapted(nn.Module):
    """A parameter that is a matrix with an adapter, in place of the parameter."""

    def __init__(self, base: Any, lora_a: Any, lora_b: Any, spec: AdapterSpec):
        super().__init__()
        self.base, self.lora_a, self.lora_b = base, lora_a, lora_b
        self.spec = spec
        self._key: mx.array | None = None

    def __getitem__(self, index: Any) -> Any:
        """Return the AdaptedArray for `...`, or the part of the module that has a name."""
        if not isinstance(index, EllipsisType):
            return super().__getitem__(index)
        spec = self.spec
        return AdaptedArray(self.base, self.lora_a, self.lora_b, spec.scale, spec.dropout, self._key)

    def astype(self, dtype: Any) -> AdaptedArray:
        """Return the AdaptedArray in another dtype."""
        adapted: AdaptedArray = self[...]
        return adapted.astype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        shape: tuple[int, ...] = self.base.shape
        return shape


def held(parameter: Any) -> Any:
    """Return what a parameter holds: an array, codes, or an AdaptedArray."""
    return parameter[...] if isinstance(parameter, Adapted) else parameter


def take(weight: mx.array | QuantizedArray | AdaptedArray, index: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.adapter.take; of codes only the rows with these indices are decoded.

    In the weight's dtype; with an adapter, in float32.
    """
    if not isinstance(weight, AdaptedArray):
        return quantization.take(weight, index)
    return quantization.take(weight.base, index) + weight.lora_a[index] @ weight.scaled_b


def keyed(spec: AdapterSpec | None, module: Module, name: str, key: mx.array | None) -> Module:
    """Return the module with a key for the dropout of each of its adapters, if they have any.

    `name`: of the module in its layer; `key`: of the layer, or None. Spec: moezoo.core.reference.adapter.adapted.
    """
    if spec is None or spec.dropout == 0 or key is None:
        return module
    own = copy(module)
    if isinstance(own, Adapted):
        own._key = fold_in(key, ADAPTER_DROPOUT, number_of(name))
    else:
        for part, inner in module.items():
            if isinstance(inner, nn.Module):
                own[part] = keyed(spec, inner, f"{name}.{part}", key)
    return own
