"""Quantized weights with random codes."""

import itertools
import math

import numpy as np

from moezoo.core.quantization.formats import BITS, GROUP_SIZES, MODES, QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight

FORMATS = [
    QuantizationFormat(mode, bits, group)
    for mode in MODES
    for bits, group in itertools.product(BITS[mode], GROUP_SIZES[mode])
]


def random_weight(
    format: QuantizationFormat, shape: tuple[int, ...], lead: tuple[int, ...], packed: tuple[int, ...], dtype=np.float32
) -> QuantizedWeight:
    """Return a weight with random codes and scales, negative scales included; no code or scale is NaN."""
    random = np.random.default_rng(3)
    rows, size = [shape[axis] for axis in lead], math.prod(shape[axis] for axis in packed)
    codes = random.integers(0, 256, (*rows, 4 * format.words(size)), np.uint8)
    if format.mode in ("mxfp8", "fp8"):
        codes[codes & 0x7F == 0x7F] = 0
    groups = (*rows, format.groups(size))
    if format.mode in ("affine", "fp8"):
        scales, biases = (random.normal(size=groups).astype(dtype) for _ in range(2))
    else:
        scales, biases = random.integers(100, 120, groups, np.uint8), None
    words = codes.view(np.uint32)
    return QuantizedWeight(format, shape, lead, packed, words, scales, biases if format.has_biases else None)
