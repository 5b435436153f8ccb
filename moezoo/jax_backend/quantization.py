"""Quantized weights on a device. Spec: moezoo.core.reference.quantization."""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight


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

    @property
    def row_size(self) -> int:
        """Number of numbers in a row of codes."""
        return math.prod(self.shape[axis] for axis in self.packed)


def quantized_array(weight: QuantizedWeight) -> QuantizedArray:
    """Move a weight's codes to the device."""
    biases = None if weight.biases is None else jnp.asarray(weight.biases)
    form = (weight.format, weight.shape, weight.lead, weight.packed)
    return QuantizedArray(jnp.asarray(weight.codes), jnp.asarray(weight.scales), biases, *form)


def dequantize(weight: QuantizedArray) -> jax.Array:
    """Spec: moezoo.core.reference.quantization.dequantize; returned in the weight's dtype."""
    rows = _rows(weight.format, weight.codes, weight.scales, weight.biases, weight.row_size).astype(weight.dtype)
    order = (*weight.lead, *weight.packed)
    return rows.reshape([weight.shape[axis] for axis in order]).transpose(np.argsort(order))


def as_array(weight: jax.Array | QuantizedArray) -> jax.Array:
    """Return an array as it is, and codes decoded."""
    return dequantize(weight) if isinstance(weight, QuantizedArray) else weight


def take(weight: jax.Array | QuantizedArray, index: jax.Array) -> jax.Array:
    """Return `weight[index]`; of codes only the rows with these indices are decoded."""
    if not isinstance(weight, QuantizedArray):
        return weight[index]
    if weight.lead != (0,) or sorted(weight.packed) != list(weight.packed):
        return dequantize(weight)[index]
    biases = None if weight.biases is None else weight.biases[index]
    rows = _rows(weight.format, weight.codes[index], weight.scales[index], biases, weight.row_size)
    return rows.astype(weight.dtype).reshape(*index.shape, *weight.shape[1:])


def _rows(
    format: QuantizationFormat, codes: jax.Array, scales: jax.Array, biases: jax.Array | None, size: int
) -> jax.Array:
    """Decode codes [..., words] to float32 [..., size]."""

    def per_number(groups: jax.Array) -> jax.Array:
        return jnp.repeat(groups.astype(jnp.float32), format.group_size, axis=-1)[..., :size]

    number, scale = _unpacked(codes, format.bits, size), scales
    match format.mode:
        case "affine":
            pass
        case "mxfp4" | "nvfp4":
            number = jnp.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], jnp.float32)[number] / 2
        case _:
            number = lax.bitcast_convert_type(number.astype(jnp.uint8), jnp.float8_e4m3fn)
    match format.mode:
        case "mxfp4" | "mxfp8":
            scale = jnp.where(scales == 255, jnp.nan, jnp.ldexp(jnp.float32(1), scales.astype(jnp.int32) - 127))
        case "nvfp4":
            scale = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
        case _:
            pass
    value = number.astype(jnp.float32) * per_number(scale)
    if biases is None:
        return value
    return _rounded(_rounded(value, scales.dtype) + per_number(biases), scales.dtype)


def _rounded(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Round float32 numbers to another dtype. Trap: XLA may drop a cast to a narrower dtype and back."""
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
    return value if dtype == value.dtype else lax.optimization_barrier(value.astype(dtype)).astype(value.dtype)


def _unpacked(words: jax.Array, bits: int, size: int) -> jax.Array:
    """Return the codes in uint32 words, low bits first, as uint32 [..., size]."""
    first = np.arange(size) * bits
    word, shift = first // 32, (first % 32).astype(np.uint32)
    low = words[..., word] >> shift
    crosses = shift + bits > 32
    if crosses.any():
        following = words[..., np.minimum(word + 1, words.shape[-1] - 1)]
        low = low | jnp.where(crosses, following << np.where(crosses, 32 - shift, 0).astype(np.uint32), 0)
    return low & np.uint32(2**bits - 1)
