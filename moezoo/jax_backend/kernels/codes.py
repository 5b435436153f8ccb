"""Decoding of quantized weights in XLA. Spec: moezoo.core.quantization.weight.decode_rows."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moezoo.core.quantization.formats import QuantizationFormat


def decoded(
    format: QuantizationFormat, codes: jax.Array, scales: jax.Array, biases: jax.Array | None, size: int
) -> jax.Array:
    """Decode uint32 codes [..., words] to float32 [..., size]."""
    lead, groups = codes.shape[:-1], format.groups(size)
    missing = groups * format.group_size - size
    if missing:
        codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, format.words(missing))])
    # Axes: group, words in it, numbers in a word: XLA unpacks in loops of their own, without divisions. Behind the
    # barrier are longer loops, which are vectorized with roundings too; a group's scale is converted once.
    number = _numbers(format, _unpacked(codes.reshape(*lead, groups, -1), format.bits))
    bias = None if biases is None else biases.astype(jnp.float32)
    number, scale, bias = lax.optimization_barrier((number, _scale_values(format, scales), bias))
    value: jax.Array = number.reshape(*lead, groups, format.group_size) * scale[..., None]
    if bias is not None:
        value = _rounded(_rounded(value, scales.dtype) + bias[..., None], scales.dtype)
    return value.reshape(*lead, groups * format.group_size)[..., :size]


def largest(format: QuantizationFormat, scales: jax.Array, biases: jax.Array | None) -> jax.Array:
    """Return the number of each group's largest code in float32 [..., groups]."""
    value: jax.Array = format.largest_code * _scale_values(format, scales)
    if biases is None:
        return value
    return _rounded(_rounded(value, scales.dtype) + biases.astype(jnp.float32), scales.dtype)


def _unpacked(words: jax.Array, bits: int) -> jax.Array:
    """Return the codes in uint32 words [..., W], low bits first, as uint32 [..., W / n, codes in n words]."""
    if 32 % bits == 0:
        codes: jax.Array = words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)
        return codes & np.uint32(2**bits - 1)
    # Eight codes of 3 bits and four of 6 take three bytes, eight codes of 5 take five: each code is in three of them.
    size = 5 if bits == 5 else 3
    byte = lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], -1, size).astype(jnp.uint32)
    first = np.arange(0, 8 * size, bits, dtype=np.uint32)

    def three_bytes(start: int) -> jax.Array:
        return byte[..., start, None] | byte[..., start + 1, None] << 8 | byte[..., start + 2, None] << 16

    codes = three_bytes(0) >> first
    if size == 5:
        codes = jnp.where(first < 20, codes, three_bytes(2) >> np.maximum(first, 16) - np.uint32(16))
    return codes & np.uint32(2**bits - 1)


def _numbers(format: QuantizationFormat, codes: jax.Array) -> jax.Array:
    """Return the numbers of codes in float32, by way of a float16 of the same exponent and mantissa."""
    match format.mode:
        case "affine":
            return codes.astype(jnp.float32)
        case "signed":
            return codes.astype(jnp.float32) - 2.0 ** (format.bits - 1)
        case "mxfp4" | "nvfp4" | "fp4":
            bits, scale = (codes & 8) << 12 | (codes & 7) << 9, 2.0**14  # exponents have a bias of 15, in place of 1
            return _float16(bits) * scale
        case _:
            bits, scale = (codes & 0x80) << 8 | (codes & 0x7F) << 7, 2.0**8  # a bias of 15, in place of 7
            return jnp.where(codes & 0x7F == 0x7F, jnp.nan, _float16(bits) * scale)


def _float16(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)


def _scale_values(format: QuantizationFormat, scales: jax.Array) -> jax.Array:
    """Return scales in float32."""
    match format.mode:
        case "mxfp4" | "mxfp8":
            return jnp.where(scales == 255, jnp.nan, jnp.ldexp(jnp.float32(1), scales.astype(jnp.int32) - 127))
        case "nvfp4":
            return lax.bitcast_convert_type(scales, jnp.float8_e4m3fn).astype(jnp.float32)
        case _:
            return scales.astype(jnp.float32)


def _rounded(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Round float32 numbers to another dtype. Trap: XLA may drop a cast to a narrower dtype and back.

    For bfloat16 by integers, half to even, which is a third faster than `lax.reduce_precision` on the CPU; a NaN stays
    one, since that of a scale has no low bits.
    """
    if dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(value, jnp.uint32)
        bits = bits + (np.uint32(0x7FFF) + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
        return lax.bitcast_convert_type(bits, jnp.float32)
    return value if dtype == value.dtype else lax.optimization_barrier(value.astype(dtype)).astype(value.dtype)
