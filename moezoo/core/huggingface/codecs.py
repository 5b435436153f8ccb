"""Encoding and decoding of quantized tensors: MXFP4 in groups of 32, FP8 in blocks, channels or whole tensors.

Decoding is exact, except for the one rounding inherent in the format (FP8: code times scale, in float32). Encoding is
its inverse with the same scales: values that no code represents exactly are rejected, unless rounding is requested.
Both process a tensor in pieces, so they use only a few MiB besides codes and values.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0); Micikevicius et al. 2022, arXiv
2209.05433 (E4M3); DeepSeek-V3, arXiv 2412.19437, section 3.3.2 (blocks of 128 x 128).
"""

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from moezoo.core.errors import CheckpointError
from moezoo.core.quantization.small_floats import E8M0_BIAS, e4m3_values, mxfp4_to_bfloat16, to_e4m3

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

FP8_BLOCK = 128
MXFP4_GROUP = 32
_PIECE = 1 << 18  # elements at a time


def mxfp4_shape(name: str, blocks: Shape, scales: Shape) -> Shape:
    """Return the shape [..., in] of the tensor stored as blocks [..., in / 32, 16] and scales [..., in / 32].

    Raises CheckpointError with the tensor's name if the two do not match.
    """
    if len(blocks) < 2 or blocks[-1] != MXFP4_GROUP // 2 or blocks[:-1] != scales:
        raise CheckpointError(
            f"{name}: MXFP4 blocks have shape {list(blocks)} and scales {list(scales)}; expected [..., in / 32, 16] "
            "and [..., in / 32]. Fetch the checkpoint again."
        )
    return (*blocks[:-2], blocks[-2] * MXFP4_GROUP)


def fp8_shape(name: str, codes: Shape, scales: Shape) -> Shape:
    """Return the shape [..., out, in] of the tensor stored as FP8 codes [..., out, in] and their scales.

    Scales are one per block, [..., ceil(out / 128), ceil(in / 128)]; one per channel, [..., out, 1] or [..., 1, in];
    or one for the tensor. Raises CheckpointError with the tensor's name if the two do not match.
    """
    if len(codes) < 2 or not (has_fp8_blocks(codes, scales) or _is_broad(codes, scales)):
        raise CheckpointError(
            f"{name}: FP8 codes have shape {list(codes)} and scales {list(scales)}; expected "
            f"{list(_blocks_of(codes))}, one scale per block of {FP8_BLOCK} x {FP8_BLOCK}, the last ones partial, or "
            "one per channel or tensor. Fetch the checkpoint again."
        )
    return codes


def has_fp8_blocks(codes: Shape, scales: Shape) -> bool:
    """Return True for scales of blocks of 128 x 128; where they are of one channel or tensor too, all is the same."""
    return scales == _blocks_of(codes)


def _blocks_of(codes: Shape) -> Shape:
    return (*codes[:-2], *(-(-size // FP8_BLOCK) for size in codes[-2:]))


def _is_broad(codes: Shape, scales: Shape) -> bool:
    """Return True for one scale of the tensor, of each matrix, or of each row or column."""
    return are_of_rows(codes, scales) or scales == (*codes[:-2], 1, codes[-1])


def are_of_rows(codes: Shape, scales: Shape) -> bool:
    """Return True for one scale of the tensor, of each matrix, or of each row."""
    return math.prod(scales) == 1 or scales in ((*codes[:-2], 1, 1), (*codes[:-1], 1))


def mxfp4_decode(blocks: Array, scales: Array) -> Array:
    """Decode uint8 blocks [..., in / 32, 16], low nibble first, with E8M0 scales [..., in / 32] to bfloat16 [..., in].

    Values are exact, see `mxfp4_to_bfloat16`.
    """
    shape = mxfp4_shape("blocks", blocks.shape, scales.shape)
    values = np.empty((scales.size, MXFP4_GROUP), ml_dtypes.bfloat16)
    rows, exponents = blocks.reshape(len(values), MXFP4_GROUP // 2), scales.reshape(-1, 1)
    for piece in _pieces(len(values), MXFP4_GROUP):
        values[piece] = mxfp4_to_bfloat16(rows[piece], exponents[piece])
    return values.reshape(shape)


def mxfp4_encode(values: Array, scales: Array, kept: Array | None = None, *, rounded: bool = False) -> Array:
    """Encode values [..., in] to uint8 blocks [..., in / 32, 16] with these scales: the inverse of `mxfp4_decode`.

    `kept`: original blocks, reused wherever they decode to the same values; only they distinguish codes that decode
    alike (infinite values, and a NaN scale). `rounded`: round to the nearest code, ties to even, and clamp to the
    range; otherwise CheckpointError if a value has no exact code.
    """
    shape = (*scales.shape, MXFP4_GROUP // 2)
    if values.shape != mxfp4_shape("blocks", shape, scales.shape):
        raise CheckpointError(
            f"values have shape {list(values.shape)} and MXFP4 scales {list(scales.shape)}; expected one scale per 32 "
            "values of the last axis."
        )
    rows, exponents = values.reshape(-1, MXFP4_GROUP), _as_bytes(scales).reshape(-1, 1)
    blocks = np.empty((len(rows), MXFP4_GROUP // 2), np.uint8)
    stored = None if kept is None else kept.reshape(blocks.shape)
    for piece in _pieces(len(rows), MXFP4_GROUP):
        numbers = rows[piece].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.ldexp(numbers, E8M0_BIAS - exponents[piece].astype(np.int32))
            code = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        blocks[piece] = code[:, 0::2] | code[:, 1::2] << 4
        if stored is not None:
            same = _same(mxfp4_decode(stored[piece][:, None], scales.reshape(-1, 1)[piece]), numbers)
            blocks[piece] = np.where(same[:, 0::2] & same[:, 1::2], stored[piece], blocks[piece])
        if not rounded:
            decoded = mxfp4_decode(blocks[piece][:, None], scales.reshape(-1, 1)[piece])
            _check_exact(_same(decoded, numbers), "MXFP4")
    return blocks.reshape(shape)


def fp8_decode(codes: Array, scales: Array) -> Array:
    """Decode E4M3 codes [..., out, in] with scales as of `fp8_shape` to float32 `code * scale`.

    Codes 0x7F and 0xFF are NaN; there is no infinity.
    """
    fp8_shape("codes", codes.shape, scales.shape)
    values = np.empty(codes.shape, np.float32)
    table = e4m3_values()
    for band, scale in _bands(codes.shape, scales):
        with np.errstate(all="ignore"):  # NaN codes, extreme scales
            np.multiply(table[_as_bytes(codes[band])], scale, out=values[band])
    return values


def fp8_encode(values: Array, scales: Array, kept: Array | None = None, *, rounded: bool = False) -> Array:
    """Encode values [..., out, in] to E4M3 codes with these scales: the inverse of `fp8_decode`.

    `kept` (codes) and `rounded` as in `mxfp4_encode`; here codes decode alike if a scale is 0, or if the product
    underflows or overflows float32.
    """
    fp8_shape("codes", values.shape, scales.shape)
    codes = np.empty(values.shape, ml_dtypes.float8_e4m3fn)
    table = e4m3_values()
    for band, scale in _bands(values.shape, scales):
        numbers = values[band].astype(np.float32)
        with np.errstate(all="ignore"):  # non-finite results are resolved by `kept`, or rejected
            code = to_e4m3(numbers / scale)
            if kept is not None:
                stored = _as_bytes(kept[band])
                code = np.where(_same(table[stored] * scale, numbers), stored, code)
            if not rounded:
                _check_exact(_same(table[code] * scale, numbers), "FP8")
        codes[band] = code.view(ml_dtypes.float8_e4m3fn)
    return codes


def _as_bytes(array: Array) -> Array:
    return array.view(np.uint8)


def _pieces(rows: int, row: int) -> Iterator[slice]:
    step = max(1, _PIECE // row)
    return (slice(start, start + step) for start in range(0, rows, step))


def _bands(shape: Shape, scales: Array) -> Iterator[tuple[tuple[int | slice, ...], Array]]:
    """Yield an index of rows that share their blocks' scales, and the scales of their columns, or of all numbers."""
    if not has_fp8_blocks(shape, scales.shape):
        whole = scales.astype(np.float32).reshape(-1)[0] if scales.size == 1 else scales.astype(np.float32)
        every = np.broadcast_to(whole, shape)
        for *matrix, start in np.ndindex(*shape[:-2], -(-shape[-2] // FP8_BLOCK)):
            index = (*matrix, slice(start * FP8_BLOCK, (start + 1) * FP8_BLOCK))
            yield index, every[index]
        return
    for outer in np.ndindex(*scales.shape[:-1]):
        *matrix, band = outer
        rows = slice(band * FP8_BLOCK, (band + 1) * FP8_BLOCK)
        scale = np.repeat(scales[outer].astype(np.float32), FP8_BLOCK)[: shape[-1]]
        yield (*matrix, rows), scale


def _same(decoded: Array, numbers: Array) -> Array:
    """Return a mask of equal values: bit for bit, except that all NaNs are equal."""
    decoded = decoded.reshape(numbers.shape).astype(np.float32)
    same: Array = decoded.view(np.uint32) == numbers.view(np.uint32)
    both_nan: Array = np.isnan(decoded) & np.isnan(numbers)
    return same | both_nan


def _check_exact(same: Array, format_name: str) -> None:
    if not same.all():
        raise CheckpointError(
            f"{np.count_nonzero(~same)} values have no exact {format_name} code with the original scales, because they "
            "changed. Export them as bfloat16 or float32."
        )
