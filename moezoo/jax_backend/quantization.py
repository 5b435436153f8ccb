"""Quantized weights on a device. Spec: moezoo.core.reference.quantization."""

import math
from dataclasses import dataclass, field, replace
from types import EllipsisType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight
from moezoo.jax_backend.kernels.codes import decoded, largest
from moezoo.jax_backend.kernels.slices import at


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """A parameter as codes on the device: see moezoo.core.quantization.weight.QuantizedWeight.

    `dtype`: of the decoded numbers, set by `astype` as for an array.
    """

    codes: jax.Array
    scales: jax.Array
    biases: jax.Array | None
    format: QuantizationFormat = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    lead: tuple[int, ...] = field(metadata={"static": True})
    packed: tuple[int, ...] = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True}, default=jnp.dtype(jnp.float32))

    def astype(self, dtype: jnp.dtype) -> "QuantizedArray":
        """Return the same codes, decoded to another dtype."""
        return replace(self, dtype=jnp.dtype(dtype))

    def __getitem__(self, index: EllipsisType | jax.Array) -> "QuantizedArray":
        """Return these indices of the first axis, which must be the first one of the codes; or, of `...`, all."""
        if isinstance(index, EllipsisType):
            return self
        assert self.lead[:1] == (0,), self.lead
        taken = [
            at(values, index) if index.ndim == 0 else values[index]
            for values in (self.codes, self.scales, *([] if self.biases is None else [self.biases]))
        ]
        more = index.ndim - 1
        lead = (*range(index.ndim), *(axis + more for axis in self.lead[1:]))
        form = (self.format, (*index.shape, *self.shape[1:]), lead, tuple(axis + more for axis in self.packed))
        return QuantizedArray(taken[0], taken[1], taken[2] if taken[2:] else None, *form, self.dtype)

    @property
    def row_size(self) -> int:
        """Number of numbers in a row of codes."""
        return math.prod(self.shape[axis] for axis in self.packed)


def quantized_array(weight: QuantizedWeight) -> QuantizedArray:
    """Move a weight's codes to the device."""
    biases = None if weight.biases is None else jnp.asarray(weight.biases)
    form = (weight.format, weight.shape, weight.lead, weight.packed)
    return QuantizedArray(jnp.asarray(weight.codes), jnp.asarray(weight.scales), biases, *form)


def quantized_weight(weight: QuantizedArray) -> QuantizedWeight:
    """Return the codes as NumPy arrays: undoes `quantized_array`."""
    biases = None if weight.biases is None else np.asarray(weight.biases)
    form = (weight.format, weight.shape, weight.lead, weight.packed)
    return QuantizedWeight(*form, np.asarray(weight.codes), np.asarray(weight.scales), biases)


def dequantize(weight: QuantizedArray) -> jax.Array:
    """Spec: moezoo.core.reference.quantization.dequantize; returned in the weight's dtype."""
    rows = decoded(weight.format, weight.codes, weight.scales, weight.biases, weight.row_size).astype(weight.dtype)
    order = (*weight.lead, *weight.packed)
    return rows.reshape([weight.shape[axis] for axis in order]).transpose(np.argsort(order))


def as_array(weight: jax.Array | QuantizedArray) -> jax.Array:
    """Return an array as it is, and codes decoded."""
    return dequantize(weight) if isinstance(weight, QuantizedArray) else weight


def is_surely_finite(weight: QuantizedArray) -> jax.Array:
    """Return True if no number is NaN or infinite, by those of each group's largest code; False: it must be decoded."""
    finite = jnp.isfinite(largest(weight.format, weight.scales, weight.biases)).all()
    if not weight.format.has_nan_codes:
        return finite
    return finite & ~(lax.bitcast_convert_type(weight.codes, jnp.uint8) & 0x7F == 0x7F).any()


def take(weight: jax.Array | QuantizedArray, index: jax.Array) -> jax.Array:
    """Return `weight[index]`; of codes only the rows with these indices are decoded."""
    if isinstance(weight, QuantizedArray) and weight.lead[:1] != (0,):
        weight = dequantize(weight)
    return as_array(weight[index])
