"""Decoding of quantized weights, number by number in float64."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.quantization.formats import WORD_BITS, QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight

Array = npt.NDArray[Any]


def dequantize(weight: QuantizedWeight) -> Array:
    """Return the numbers that a weight's codes stand for, float64 of the parameter's shape.

    A number is `scale * code + bias` with the scale, and in affine mode the bias, of its group; there, product and sum
    are rounded to the scales' dtype. Codes follow each other in a row's bits, low bits first, across the borders of
    uint32 words.

    Source: as moezoo.core.quantization.formats.
    """
    format = weight.format
    rows = np.empty((*weight.codes.shape[:-1], weight.row_size))
    for index in np.ndindex(*weight.codes.shape[:-1]):
        bits = sum(int(word) << (WORD_BITS * place) for place, word in enumerate(weight.codes[index]))
        for place in range(weight.row_size):
            code = (bits >> (format.bits * place)) & (2**format.bits - 1)
            group = (*index, place // format.group_size)
            value = scale_of(format, weight.scales[group]) * number_of(format, code)
            if weight.biases is not None:
                value = _rounded(_rounded(value, weight) + float(weight.biases[group]), weight)
            rows[*index, place] = value
    return weight.in_place(rows)


def _rounded(value: float, weight: QuantizedWeight) -> float:
    return float(np.float64(value).astype(np.float32).astype(weight.scales.dtype))


def number_of(format: QuantizationFormat, code: int) -> float:
    """Return what a code stands for, before the scale: an integer, or a small float."""
    match format.mode:
        case "affine":
            return float(code)
        case "signed":
            return float(code - 2 ** (format.bits - 1))
        case "mxfp4" | "nvfp4" | "fp4":
            return small_float(code, exponent_bits=2, mantissa_bits=1)
        case _:
            return _e4m3(code)


def scale_of(format: QuantizationFormat, scale: Any) -> float:
    """Return the factor that a stored scale stands for."""
    match format.mode:
        case "mxfp4" | "mxfp8":
            return math.nan if scale == 255 else 2.0 ** (int(scale) - 127)
        case "nvfp4":
            return _e4m3(int(scale))
        case _:
            return float(scale)


def _e4m3(code: int) -> float:
    return math.nan if code & 0x7F == 0x7F else small_float(code, exponent_bits=4, mantissa_bits=3)


def small_float(code: int, *, exponent_bits: int, mantissa_bits: int) -> float:
    """Return a float of sign, exponent and mantissa without infinities; exponent 0 is subnormal."""
    mantissa = code & (2**mantissa_bits - 1)
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    bias = 2 ** (exponent_bits - 1) - 1
    if exponent == 0:
        return float(sign * mantissa * 2.0 ** (1 - bias - mantissa_bits))
    return float(sign * (2**mantissa_bits + mantissa) * 2.0 ** (exponent - bias - mantissa_bits))
