"""Quantization of float matrices, with the codes, scales and biases of `mx.quantize`, but without MLX.

A row is cut into groups, and each group gets the scale (and bias) that its largest and smallest numbers need:

    affine:        edge = the one of max and min with the larger magnitude (max if equal)
                   step = max((max - min) / (2^bits - 1), 1e-7), negative if the edge is the maximum
                   scale = edge / rint(edge / step), bias = edge; step and 0 if the quotient rounds to 0
                   code = clip(rint((value - bias) / scale), 0, 2^bits - 1)
    mxfp4, mxfp8:  scale = the smallest power of two >= max|value| / (6 or 448); 1 if all are 0
    nvfp4:         scale = max|value| / 6 as E4M3
                   code = the float nearest to value / scale; ties: E2M1 to the smaller magnitude, E4M3 to even

So 0 is a code's exact value in affine mode. Arithmetic is in float32; of the float modes the scale before it is encoded
and the quotients are rounded to the values' dtype, as MLX computes them.

Source: mlx 0.32.4, `mx.quantize` on the CPU; equal bit for bit in every mode, width, group size and dtype.
Differs: MLX's scale of a group whose largest magnitude is below 6 * 2^-127 (mxfp8: 448 * 2^-127) wraps around to a huge
one; here it is the smallest, 2^-127. In mode nvfp4 a number beyond 7e9, where a float32 cannot tell quotients apart,
becomes a smaller code there; here it is the largest one. Numbers that are not finite are refused.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from moezoo.core.errors import CheckpointError
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.small_floats import E8M0_BIAS, LARGEST_E2M1, LARGEST_E4M3, to_e4m3
from moezoo.core.quantization.weight import QuantizedWeight, scale_values

Array = npt.NDArray[Any]
Quantized = tuple[Array, Array, Array | None]

_PIECE = 1 << 18  # numbers quantized at a time by one thread: its arrays stay in the cache
_LARGEST = {4: np.float32(LARGEST_E2M1), 8: np.float32(LARGEST_E4M3)}
_SMALLEST_STEP = np.float32(1e-7)
_BETWEEN_E2M1 = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # a larger magnitude is the next code's


def quantize(values: Array, format: QuantizationFormat) -> Quantized:
    """Return codes uint32 [..., words], scales [..., groups] and, in affine mode, biases like the scales.

    Rows are quantized in pieces by all cores; memory besides values and result is a few MiB per core.

    Args:
        values: float32, float16 or bfloat16 [..., size]; scales and biases of affine mode have this dtype.
        format: any but those that are only read, whose scales may be shared by rows.

    Raises CheckpointError: `size` does not divide, or a number is NaN or infinite.
    """
    size = values.shape[-1]
    assert not format.is_only_read, "scales may be shared by rows"
    if not format.divides(size):
        raise CheckpointError(f"rows of {size} numbers cannot be stored as {format}.")
    affine, lead = format.has_biases, values.shape[:-1]
    rows = values.reshape(-1, size)
    codes = np.empty((len(rows), format.words(size)), np.uint32)
    scales = np.empty((len(rows), format.groups(size)), values.dtype if affine else np.uint8)
    biases = np.empty_like(scales) if affine else None

    def fill(piece: slice) -> None:
        groups = np.ascontiguousarray(rows[piece]).reshape(-1, format.group_size)
        number, scale, bias = _affine(groups, format) if affine else _small_floats(groups, format)
        codes[piece] = pack(number.reshape(-1, size), format.bits)
        scales[piece] = scale.reshape(-1, scales.shape[1])
        if biases is not None and bias is not None:
            biases[piece] = bias.reshape(-1, scales.shape[1])

    step = max(1, _PIECE // max(1, size))
    pieces = [slice(start, start + step) for start in range(0, len(rows), step)]
    if len(pieces) > 1:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(fill, pieces):
                pass
    else:
        for piece in pieces:
            fill(piece)
    codes, scales = (array.reshape(*lead, array.shape[1]) for array in (codes, scales))
    return codes, scales, None if biases is None else biases.reshape(scales.shape)


def quantize_weight(
    values: Array, format: QuantizationFormat, lead: tuple[int, ...], packed: tuple[int, ...]
) -> QuantizedWeight:
    """Quantize a parameter along the axes `packed`, with one row of codes per index of `lead` (see QuantizedWeight).

    A view in another order of axes is copied one index of the first axis of `lead` at a time. Raises as `quantize`.
    """
    ordered = values.transpose((*lead, *packed))
    rows = ordered.shape[: len(lead)]
    if not rows or ordered.flags.c_contiguous:
        made = [quantize(ordered.reshape(*rows, -1), format)]
    else:
        step = max(1, rows[0] * _PIECE * (os.cpu_count() or 1) // max(1, values.size))
        pieces = (ordered[start : start + step] for start in range(0, rows[0], step))
        made = [quantize(piece.reshape(*piece.shape[: len(lead)], -1), format) for piece in pieces]
    codes, scales = np.concatenate([each[0] for each in made]), np.concatenate([each[1] for each in made])
    biases = np.concatenate([each[2] for each in made if each[2] is not None]) if format.has_biases else None
    return QuantizedWeight(format, values.shape, lead, packed, codes, scales, biases)


def pack(codes: Array, bits: int) -> Array:
    """Pack codes uint8 [..., size] into uint32 words [..., size * bits / 32], low bits first: undoes `unpack`."""
    octets = np.ascontiguousarray(codes).view("<u8")  # eight codes, one per byte, to `bits` bytes in three steps
    for width in (8, 16, 32) if bits < 8 else ():
        used = width // 8 * bits
        low = octets & np.uint64(sum((2**used - 1) << place for place in range(0, 64, 2 * width)))
        octets = low | (octets ^ low) >> np.uint64(width - used)
    packed = octets.view(np.uint8).reshape(*octets.shape, 8)[..., :bits]
    return np.ascontiguousarray(packed).reshape(*codes.shape[:-1], -1).view(np.uint32)


def _affine(groups: Array, format: QuantizationFormat) -> tuple[Array, Array, Array]:
    """Return codes uint8 [groups, group size], scales and biases [groups]."""
    largest_code = np.float32(2**format.bits - 1)
    value = _float32(groups)
    highest, lowest = value.max(-1), value.min(-1)
    _check_finite(highest, lowest)
    with np.errstate(over="ignore", under="ignore"):
        step = np.maximum((highest - lowest) / largest_code, _SMALLEST_STEP)
        negative = np.abs(lowest) > np.abs(highest)
        step, edge = np.where(negative, step, -step), np.where(negative, lowest, highest)
        quotient = np.rint(edge / step)
        is_zero = quotient == 0
        scale = np.where(is_zero, step, edge / np.where(is_zero, np.float32(1), quotient))
        bias = np.where(is_zero, np.float32(0), edge)
        value -= bias[:, None]
        value /= scale[:, None]
        np.rint(value, out=value)
        np.clip(value, 0, largest_code, out=value)
        return value.astype(np.uint8), scale.astype(groups.dtype), bias.astype(groups.dtype)


def _small_floats(groups: Array, format: QuantizationFormat) -> tuple[Array, Array, None]:
    """Return codes uint8 [groups, group size] and scales uint8 [groups]."""
    value = _float32(groups)
    magnitude = np.maximum(np.abs(value.max(-1)), np.abs(value.min(-1)))
    _check_finite(magnitude)
    with np.errstate(all="ignore"):
        needed = (magnitude / _LARGEST[format.bits]).astype(groups.dtype).astype(np.float32)
        scale = to_e4m3(needed) if format.mode == "nvfp4" else _e8m0_at_least(needed)
        factor = scale_values(format, scale)
        value /= np.where(factor == 0, np.float32(np.inf), factor)[:, None]
    if format.mode == "nvfp4" and groups.dtype != np.float32:
        value = value.astype(groups.dtype).astype(np.float32)  # a quotient by a power of two is exact
    return (to_e4m3(value) if format.bits == 8 else _to_e2m1(value)), scale, None


def _float32(groups: Array) -> Array:
    """Return a new float32 array of the same values."""
    if groups.dtype == ml_dtypes.bfloat16:
        return (groups.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return groups.astype(np.float32)


def _check_finite(*extremes: Array) -> None:
    if not all(np.isfinite(extreme).all() for extreme in extremes):
        raise CheckpointError("a weight has NaN or infinite numbers and cannot be quantized. Use another checkpoint.")


def _e8m0_at_least(needed: Array) -> Array:
    """Return the smallest power of two >= `needed` as E8M0; 1 for 0."""
    fraction, exponent = np.frexp(needed)
    exponent = np.where(fraction == 0.5, exponent - 1, exponent)
    scale: Array = np.clip(exponent + E8M0_BIAS, 0, 254).astype(np.uint8)  # frexp(0) is (0, 0)
    return scale


def _to_e2m1(value: Array) -> Array:
    magnitude = np.abs(value)
    codes: Array = np.zeros(value.shape, np.uint8)
    for border in _BETWEEN_E2M1:
        codes += magnitude > np.float32(border)
    codes[(value < 0) & (codes > 0)] |= 8
    return codes
