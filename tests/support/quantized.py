"""Quantized weights with random codes, and models with quantized weights."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moezoo.core.quantization.formats import BITS, GROUP_SIZES, MODES, QuantizationFormat
from moezoo.core.quantization.quantize import quantize_weight
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
    if format.has_biases or format.is_only_read:
        scales, biases = (random.normal(size=groups).astype(dtype) for _ in range(2))
    else:
        scales, biases = random.integers(100, 120, groups, np.uint8), None
    words = codes.view(np.uint32)
    return QuantizedWeight(format, shape, lead, packed, words, scales, biases if format.has_biases else None)


def quantized_weights(weights: Mapping[str, np.ndarray], format: QuantizationFormat) -> dict[str, Any]:
    """Return the weights with matrices and embeddings as codes, as far as their rows divide."""
    found: dict[str, Any] = {}
    for name, value in weights.items():
        lead, packed = _axes(name, value.ndim)
        fits = lead and value.size and format.divides(math.prod(value.shape[axis] for axis in packed))
        found[name] = quantize_weight(value, format, lead, packed) if fits else value
    return found


def _axes(name: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return lead and packed axes: an output's numbers are a row; of an embedding, a token's."""
    if name in ("embedding.weight", "layer_inputs.weight"):
        return (0,), tuple(range(1, rank))
    own = name.rpartition(".")[2]  # lora_a and lora_b stay floats
    if not own.startswith("w_") or own in ("w_mix", "w_residual"):
        return (), ()
    if ".experts." in name:
        return (0, 2), (1,)
    return ((2,), (0, 1)) if own == "w_output" and rank == 3 else (tuple(range(1, rank)), (0,))
