"""Values of E2M1, E4M3 and E8M0, and decoding of MXFP4 to bfloat16, which holds every value of it exactly."""

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

E8M0_BIAS = 127
LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0


@cache
def e8m0_values() -> Array:
    """Return float32 [256]: 2^(code - 127); 255 is NaN."""
    scale = np.ldexp(1.0, np.arange(256) - E8M0_BIAS)
    scale[255] = np.nan
    return scale.astype(np.float32)


@cache
def e4m3_values() -> Array:
    """Return float32 [256]; 0x7F and 0xFF are NaN."""
    table: Array = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return table


@cache
def e2m1_values() -> Array:
    """Return float32 [16]."""
    table: Array = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return table


def mxfp4_to_bfloat16(pairs: Array, scales: Array) -> Array:
    """Decode bytes uint8 [groups, 16], low nibble first, with E8M0 scales [groups, 1], to bfloat16 [groups, 32].

    A value is `code * 2^(scale - 127)`, exact in bfloat16, including subnormals. Beyond its range it is infinite (scale
    253 with codes 4 and 6, 254 from code 2 on); scale 255 is NaN.
    """
    index = scales.view(np.uint8).astype(np.uint16) << 8 | pairs
    decoded: Array = _pairs()[index].view(ml_dtypes.bfloat16)
    return decoded


def to_e4m3(value: Array) -> Array:
    """Round float32 numbers to the nearest E4M3, ties to even, and clamp them to the range; as uint8."""
    clamped = np.clip(value, np.float32(-LARGEST_E4M3), np.float32(LARGEST_E4M3))
    codes: Array = clamped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes


@cache
def _pairs() -> Array:
    """Lookup table of the two bfloat16 values of a byte, low nibble first, as uint32 [scale * 256 + byte]."""
    scale = e8m0_values().astype(np.float64)
    with np.errstate(over="ignore"):  # infinite beyond the range
        numbers = (scale[:, None] * e2m1_values()).astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    pairs = np.stack([np.tile(numbers, (1, 16)), np.repeat(numbers, 16, axis=1)], axis=-1)
    table: Array = np.ascontiguousarray(pairs).view(np.uint32).reshape(-1)
    return table
