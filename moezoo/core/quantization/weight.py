"""A parameter that is kept as codes, and its decoding to float32."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import CheckpointError, TrainingError
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.small_floats import e2m1_values, e4m3_values, e8m0_values, mxfp4_to_bfloat16

Array = npt.NDArray[Any]

_PIECE = 1 << 20  # numbers decoded at a time


@dataclass(frozen=True)
class QuantizedWeight:
    """A parameter as codes: rows along some of its axes are packed, with one scale per group of a row.

    With the parameter's axes in the order `(*lead, *packed)`, codes have one axis per axis of `lead`, and the axes of
    `packed` together are the row: `w_query` [D, N, H], stored by output, has lead (1, 2), packed (0,) and codes
    [N, H, words of D]; `w_output` [N, H, D] has lead (2,), packed (0, 1) and codes [D, words of N*H]; `w_up` of experts
    [E, D, F] has lead (0, 2), packed (1,) and codes [E, F, words of D].

    Fields:
        format: mode, bits and group size.
        shape: shape of the parameter, as in the parameter table.
        lead: axes of the parameter that are axes of the codes, in the codes' order.
        packed: axes of the parameter that a row of codes runs over, outer to inner.
        codes: uint32 [*lead, words].
        scales: [*lead, groups]; mxfp4, mxfp8: uint8 (E8M0); nvfp4: uint8 (E4M3); else a float dtype.
        biases: affine: as scales; else None.

    Raises CheckpointError if shapes or dtypes do not agree.
    """

    format: QuantizationFormat
    shape: tuple[int, ...]
    lead: tuple[int, ...]
    packed: tuple[int, ...]
    codes: Array
    scales: Array
    biases: Array | None = None

    def __post_init__(self) -> None:
        assert sorted((*self.lead, *self.packed)) == list(range(len(self.shape))), (self.lead, self.packed, self.shape)
        rows, size = tuple(self.shape[axis] for axis in self.lead), self.row_size
        if not self.format.divides(size):
            raise CheckpointError(f"rows of {size} numbers cannot be stored as {self.format}.")
        expected = {"codes": (*rows, self.format.words(size)), "scales": (*rows, self.format.groups(size))}
        if self.format.has_biases:
            expected["biases"] = expected["scales"]
        for name, shape in expected.items():
            array = getattr(self, name)
            if array is None or array.shape != shape:
                got = None if array is None else list(array.shape)
                raise CheckpointError(f"{name} of a weight in {self.format} have shape {got}; expected {list(shape)}.")

    @property
    def row_size(self) -> int:
        """Number of numbers in a row of codes."""
        return math.prod(self.shape[axis] for axis in self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.biases is None else self.biases.nbytes)

    def values(self) -> Array:
        """Decode to a contiguous float32 array of the parameter's shape."""
        rows = decode_rows(self.format, self.codes, self.scales, self.biases, self.row_size)
        return self.in_place(rows)

    def bound(self) -> float:
        """Return a magnitude that no number exceeds, but for NaN codes; not finite if a scale or bias is not."""
        is_power = self.format.mode in ("mxfp4", "mxfp8")  # E8M0 has no sign
        scale = self.scales.reshape(-1).max(keepdims=True) if is_power else _largest_magnitude(self.scales)
        bias = None if self.biases is None else _largest_magnitude(self.biases)
        code = np.array([self.format.largest_code], np.float32)
        return float(_scaled(code, self.format, scale, bias, lambda groups: groups)[0])

    def in_place(self, rows: Array) -> Array:
        """Return decoded rows [*lead, row size] in the parameter's shape and order of axes."""
        order = (*self.lead, *self.packed)
        split = rows.reshape([self.shape[axis] for axis in order])
        return np.ascontiguousarray(split.transpose(np.argsort(order)))


def stored(weights: Mapping[str, Any], name: str) -> Array | QuantizedWeight:
    """Return a parameter as it is stored: as codes, if `weights` has it so, or as an array of floats."""
    as_stored = getattr(weights, "stored", None)
    value: Array | QuantizedWeight = weights[name] if as_stored is None else as_stored(name)
    return value


def check_no_codes(names: Collection[str]) -> None:
    """Raise TrainingError if there are names: those of the parameters that a model keeps as codes."""
    if names:
        raise TrainingError(
            f"{len(names)} parameters are quantized ({next(iter(names))}, ...), and training all parameters of a "
            "quantized model is not supported. Make a checkpoint of floats with `moezoo convert --dequantize`."
        )


def decode_rows(format: QuantizationFormat, codes: Array, scales: Array, biases: Array | None, size: int) -> Array:
    """Decode uint32 codes [..., words] to float32 [..., size], in pieces that use a few MiB besides the result.

    Affine numbers are those of arithmetic in the scales' dtype: rounded as a product, and again as a sum with the bias.
    Other products are exact in float32, except where scales are floats: there they are rounded once.
    """
    out = np.empty((*codes.shape[:-1], size), np.float32)
    rows, flat = out.reshape(-1, size), codes.reshape(-1, codes.shape[-1])
    scales = scales.reshape(-1, scales.shape[-1])
    biases = None if biases is None else biases.reshape(scales.shape)
    step = max(1, _PIECE // max(1, size))
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        if format.mode == "mxfp4":  # by pairs: measured six times as fast
            rows[piece] = _mxfp4_rows(flat[piece], scales[piece])
            continue
        number = _numbers(format, unpack(flat[piece], format.bits, size))
        bias = None if biases is None else biases[piece]
        rows[piece] = _scaled(number, format, scales[piece], bias, lambda groups: _per_number(groups, format, size))
    return out


def _scaled(
    number: Array, format: QuantizationFormat, scales: Array, biases: Array | None, spread: Callable[[Array], Array]
) -> Array:
    """Multiply numbers of codes by their scales and add biases, in place; `spread`: from groups to numbers."""
    with np.errstate(all="ignore"):  # extreme scales, NaN codes
        number *= spread(scale_values(format, scales))
        if biases is not None:
            number = number.astype(scales.dtype, copy=False).astype(np.float32, copy=False)
            number += spread(biases.astype(np.float32))
            number = number.astype(scales.dtype, copy=False).astype(np.float32, copy=False)
    return number


def unpack(words: Array, bits: int, size: int) -> Array:
    """Unpack uint32 words [..., size * bits / 32] to codes uint8 [..., size], low bits first."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream
    if bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes: Array = (stream[..., None] >> shifts) & (2**bits - 1)
        return codes.reshape(*words.shape[:-1], size)
    # Eight codes take `bits` bytes: a little-endian integer.
    octets = stream.reshape(*words.shape[:-1], size // 8, bits)
    padded = np.zeros((*octets.shape[:-1], 8), np.uint8)
    padded[..., :bits] = octets
    shifts = np.arange(0, 8 * bits, bits, dtype=np.uint64)
    wide: Array = (padded.view("<u8") >> shifts) & np.uint64(2**bits - 1)
    return wide.astype(np.uint8).reshape(*words.shape[:-1], size)


def scale_values(format: QuantizationFormat, scales: Array) -> Array:
    """Return scales as float32; E8M0 255 and E4M3 0x7F are NaN."""
    match format.mode:
        case "mxfp4" | "mxfp8":
            return e8m0_values()[scales.view(np.uint8)]
        case "nvfp4":
            return e4m3_values()[scales.view(np.uint8)]
        case _:
            return scales.astype(np.float32)


def _largest_magnitude(array: Array) -> Array:
    """Return the element [1] of the largest magnitude; NaN counts as the largest."""
    bits = array.view(f"u{array.itemsize}")
    mask = (1 << 8 * array.itemsize - 1) - 1
    largest = np.maximum.reduce(bits & bits.dtype.type(mask), axis=None, initial=0)
    return np.array([largest], bits.dtype).view(array.dtype)


def _per_number(groups: Array, format: QuantizationFormat, size: int) -> Array:
    return np.repeat(groups, format.group_size, axis=-1)[..., :size]


def _mxfp4_rows(words: Array, scales: Array) -> Array:
    pairs = np.ascontiguousarray(words).view(np.uint8).reshape(-1, 16)
    halves = mxfp4_to_bfloat16(pairs, np.ascontiguousarray(scales).reshape(-1, 1)).view(np.uint16)
    rows: Array = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return rows.reshape(len(words), -1)


def _numbers(format: QuantizationFormat, codes: Array) -> Array:
    match format.mode:
        case "affine":
            return codes.astype(np.float32)
        case "mxfp4" | "nvfp4" | "fp4":
            return e2m1_values()[codes]
        case "signed":
            return codes.astype(np.float32) - np.float32(2 ** (format.bits - 1))
        case _:
            return e4m3_values()[codes]
