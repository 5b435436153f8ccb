"""Quantized weights on a device. Spec: moezoo.core.reference.quantization."""

import math
from dataclasses import dataclass, replace
from types import EllipsisType

import ml_dtypes
import mlx.core as mx
import numpy as np

from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.small_floats import e2m1_values
from moezoo.core.quantization.weight import QuantizedWeight


@dataclass(frozen=True)
class QuantizedArray:
    """A parameter as codes on the device: see moezoo.core.quantization.weight.QuantizedWeight.

    `dtype`: of the decoded numbers, set by `astype` as for an array.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array | None
    format: QuantizationFormat
    shape: tuple[int, ...]
    lead: tuple[int, ...]
    packed: tuple[int, ...]
    dtype: mx.Dtype = mx.float32

    def astype(self, dtype: mx.Dtype) -> "QuantizedArray":
        """Return the same codes, decoded to another dtype."""
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def __getitem__(self, index: EllipsisType | mx.array) -> "QuantizedArray":
        """Return these indices of the first axis, which must be the first one of the codes; or, of `...`, all."""
        if isinstance(index, EllipsisType):
            return self
        assert self.lead[:1] == (0,), self.lead
        biases, more = None if self.biases is None else self.biases[index], index.ndim - 1
        lead = (*range(index.ndim), *(axis + more for axis in self.lead[1:]))
        form = (self.format, (*index.shape, *self.shape[1:]), lead, tuple(axis + more for axis in self.packed))
        return QuantizedArray(self.codes[index], self.scales[index], biases, *form, self.dtype)

    @property
    def row_size(self) -> int:
        """Number of numbers in a row of codes."""
        return math.prod(self.shape[axis] for axis in self.packed)


def quantized_array(weight: QuantizedWeight) -> QuantizedArray:
    """Move a weight's codes to the device."""
    biases = None if weight.biases is None else _array(weight.biases)
    form = (weight.format, weight.shape, weight.lead, weight.packed)
    return QuantizedArray(_array(weight.codes), _array(weight.scales), biases, *form)


def quantized_weight(weight: QuantizedArray) -> QuantizedWeight:
    """Return the codes as NumPy arrays: undoes `quantized_array`."""
    biases = None if weight.biases is None else _to_numpy(weight.biases)
    form = (weight.format, weight.shape, weight.lead, weight.packed)
    return QuantizedWeight(*form, _to_numpy(weight.codes), _to_numpy(weight.scales), biases)


def dequantize(weight: QuantizedArray) -> mx.array:
    """Spec: moezoo.core.reference.quantization.dequantize; returned in the weight's dtype."""
    rows = _rows(weight.format, weight.codes, weight.scales, weight.biases, weight.row_size).astype(weight.dtype)
    order = (*weight.lead, *weight.packed)
    return rows.reshape([weight.shape[axis] for axis in order]).transpose([int(axis) for axis in np.argsort(order)])


def as_array(weight: mx.array | QuantizedArray) -> mx.array:
    """Return an array as it is, and codes decoded."""
    return dequantize(weight) if isinstance(weight, QuantizedArray) else weight


def is_surely_finite(weight: QuantizedArray) -> mx.array:
    """Return True if no number is NaN or infinite, by those of each group's largest code; False: it must be decoded."""
    format, scales = weight.format, weight.scales
    match format.mode:
        case "mxfp4" | "mxfp8":  # a power of two
            finite = (scales <= math.floor(255 - math.log2(format.largest_code))).all()
        case "nvfp4":
            finite = ((scales & 0x7F) != 0x7F).all()
        case "fp8" | "fp4" | "signed":
            finite = mx.isfinite(scales.astype(mx.float32) * format.largest_code).all()
        case _:
            assert weight.biases is not None
            finite = mx.isfinite(scales * format.largest_code + weight.biases).all()
    return finite & ((weight.codes.view(mx.uint8) & 0x7F) != 0x7F).all() if format.has_nan_codes else finite


def take(weight: mx.array | QuantizedArray, index: mx.array) -> mx.array:
    """Return `weight[index]`; of codes only the rows with these indices are decoded."""
    if isinstance(weight, QuantizedArray) and weight.lead[:1] != (0,):
        weight = dequantize(weight)
    return as_array(weight[index])


def _rows(
    format: QuantizationFormat, codes: mx.array, scales: mx.array, biases: mx.array | None, size: int
) -> mx.array:
    """Decode codes [..., words] to float32 [..., size]."""
    if format.is_only_read:
        scale = scales.astype(mx.float32)[..., mx.arange(size) // format.group_size]
        return _numbers(format, codes) * scale
    if biases is None:
        return mx.dequantize(codes, scales, None, format.group_size, format.bits, format.mode, dtype=mx.float32)
    return mx.dequantize(codes, scales, biases, format.group_size, format.bits, format.mode).astype(mx.float32)


def _numbers(format: QuantizationFormat, codes: mx.array) -> mx.array:
    """Return what codes [..., words] stand for before the scale, float32 [..., size]; of modes that are only read."""
    number = codes.view(mx.uint8)
    if format.mode == "fp8":
        return mx.from_fp8(number, mx.float32)
    if format.bits == 4:
        number = mx.stack([number & 15, number >> 4], axis=-1).reshape(*number.shape[:-1], -1)
    if format.mode == "fp4":
        return mx.array(e2m1_values())[number]
    return number.astype(mx.float32) - 2.0 ** (format.bits - 1)


def _to_numpy(value: mx.array) -> np.ndarray:
    """Return a read-only view of an array."""
    bfloat16 = value.dtype == mx.bfloat16
    view = np.asarray(value.view(mx.uint16) if bfloat16 else value)
    return view.view(ml_dtypes.bfloat16) if bfloat16 else view


def _array(value: np.ndarray) -> mx.array:
    if value.dtype == ml_dtypes.bfloat16:
        return mx.array(value.view(np.uint16)).view(mx.bfloat16)
    return mx.array(value)
