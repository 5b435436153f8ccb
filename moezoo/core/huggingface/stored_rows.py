"""Rows of codes from the arrays of files: how each kind of quantized tensor stores codes and what lies beside them.

A tensor [*rows, size] is stored as codes and, beside them, scales and more (`Readable.stored`). Here they become what
`QuantizedWeight` has: uint32 codes [*rows, words], scales [*rows, groups] and biases like the scales. Codes come back
bit for bit; scales of larger parts of a tensor are repeated for each of its groups.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.huggingface.codecs import FP8_BLOCK, are_of_rows, has_fp8_blocks
from moezoo.core.huggingface.ledger import FLOATS, Readable

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


def code_words(tensor: Readable, stored: Array) -> Array:
    """Return codes as they are stored, of the tensor or of some of its rows, as uint32 [*rows, words]."""
    outer = stored.shape[: len(tensor.shape) - 1]
    return stored.reshape(*outer, -1).view(np.uint8).view(np.uint32)


def stored_codes(words: Array, dtype: np.dtype[Any], shape: Shape) -> Array:
    """Undo `code_words`."""
    codes: Array = words.view(dtype).reshape(shape)
    return codes


def scale_dtype(tensor: Readable, stored: str) -> np.dtype[Any]:
    """Return the dtype of scales and biases as `group_scales` returns them, by the dtype of the stored scales."""
    import ml_dtypes

    assert tensor.format is not None
    if tensor.format.has_byte_scales:
        return np.dtype(np.uint8)
    return np.dtype(ml_dtypes.bfloat16) if stored == "BF16" else np.dtype(FLOATS.get(stored, "float32"))


def has_group_scales(tensor: Readable, scales: Shape) -> bool:
    """Return True unless scales are of columns, which no group has."""
    assert tensor.format is not None
    codes = tensor.shape
    return tensor.format.mode != "fp8" or has_fp8_blocks(codes, scales) or are_of_rows(codes, scales)


def group_scales(tensor: Readable, beside: Sequence[Array], rows: int | None = None) -> list[Array]:
    """Return scales [*rows, groups], and biases if the format has them, from the arrays beside the codes.

    `rows`: the size of the first axis, if the arrays are only of some of its indices. Needs `has_group_scales`.
    """
    format = tensor.format
    assert format is not None
    if format.mode != "fp8":
        return [array if format.has_biases else array.view(np.uint8) for array in beside]
    scales = beside[0]
    if scales.dtype.itemsize == 1:
        scales = scales.astype(np.float32)
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    if has_fp8_blocks(shape, scales.shape):
        return [np.repeat(scales, FP8_BLOCK, axis=-2)[..., : shape[-2], :]]
    whole = scales.reshape(()) if scales.size == 1 else scales
    return [np.broadcast_to(whole, (*shape[:-1], format.groups(shape[-1])))]
