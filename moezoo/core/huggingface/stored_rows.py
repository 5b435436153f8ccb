"""Rows of codes from the arrays of files: how each kind of quantized tensor stores codes and what lies beside them.

A tensor [*rows, size] is stored as codes and, beside them, scales and more (`Readable.stored`). Here they become what
`QuantizedWeight` has: uint32 codes [*rows, words], scales [*rows, groups] and biases like the scales. Codes come back
bit for bit; scales of larger parts of a tensor are repeated for each of its groups.

    packing       codes                               beside them
    words         uint32                              scales, biases: as they are (mlx-lm)
    blocks        uint8 [..., groups, 16]             scales (MXFP4 of gpt-oss)
    bytes         E2M1, two per byte, or E4M3         scales as bytes
    fp8           E4M3                                scales of blocks, rows or the tensor
    signed        int32 words, or int8                scales of groups, rows or the tensor
    zero points   the same                            scales and integers, of groups or rows: bias = -scale * zero
    gptq, awq     int32 words of columns              scales, zeros and groups of columns
    divided       E2M1, two per byte                  scales in E4M3 and one by which they are divided
    multiplied    the same                            scales in E4M3 and one by which they are multiplied

Words of int32 have integers plus half their range. Source: as moezoo.core.huggingface.quantization_methods.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.codecs import FP8_BLOCK, are_of_rows, has_fp8_blocks
from moezoo.core.huggingface.ledger import FLOATS, Readable
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.small_floats import e4m3_values
from moezoo.core.quantization.weight import unpack

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

_COLUMNS = ("gptq", "gptq v2", "awq")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # place in a word of the codes of eight consecutive outputs, low bits first
_NIBBLE = np.uint32(15)
_SIGNS = np.uint32(0x80808080)  # turns int8 into integers plus 128


def has_rows(tensor: Readable) -> bool:
    """Return True if the stored arrays have the tensor's rows, rather than its columns."""
    return tensor.packing not in _COLUMNS


def code_words(tensor: Readable, stored: Array) -> Array:
    """Return codes as they are stored, of the tensor or of some of its rows, as uint32 [*rows, words]."""
    if tensor.packing == "awq":
        return _rows_of_awq(stored.view(np.uint32))
    if not has_rows(tensor):
        return np.ascontiguousarray(stored.T).view(np.uint32)
    outer = stored.shape[: len(tensor.shape) - 1]
    words: Array = stored.reshape(*outer, -1).view(np.uint8).view(np.uint32)
    return words ^ _SIGNS if stored.dtype == np.int8 and _is_integer(tensor) else words


def stored_codes(tensor: Readable, words: Array, dtype: np.dtype[Any], shape: Shape) -> Array:
    """Undo `code_words`."""
    if tensor.packing == "awq":
        words = _columns_of_awq(words)
    elif not has_rows(tensor):
        words = np.ascontiguousarray(words.T)
    words = words ^ _SIGNS if dtype == np.int8 and _is_integer(tensor) else words
    codes: Array = words.view(dtype).reshape(shape)
    return codes


def scale_dtype(tensor: Readable, stored: str) -> np.dtype[Any]:
    """Return the dtype of scales and biases as `group_scales` returns them, by the dtype of the stored scales."""
    import ml_dtypes

    assert tensor.format is not None
    if tensor.format.has_byte_scales:
        return np.dtype(np.uint8)
    if tensor.packing not in ("words", "fp8") and tensor.format.has_biases:
        return np.dtype(np.float32)
    return np.dtype(ml_dtypes.bfloat16) if stored == "BF16" else np.dtype(FLOATS.get(stored, "float32"))


def has_group_scales(tensor: Readable, scales: Shape) -> bool:
    """Return True unless scales are of columns, which no group has."""
    codes = tensor.shape
    return tensor.packing != "fp8" or has_fp8_blocks(codes, scales) or are_of_rows(codes, scales)


def group_scales(tensor: Readable, beside: Sequence[Array], rows: int | None = None) -> list[Array]:
    """Return scales [*rows, groups], and biases if the format has them, from the arrays beside the codes.

    `rows`: the size of the first axis, if the arrays are only of some of its indices. Needs `has_group_scales`.
    """
    format, scales = tensor.format, beside[0]
    assert format is not None
    shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
    match tensor.packing:
        case "words" | "blocks" | "bytes":
            return [array if format.has_biases else array.view(np.uint8) for array in beside]
        case "divided" | "multiplied":
            number, factor = e4m3_values()[scales.view(np.uint8)], beside[1].reshape(())
            with np.errstate(all="ignore"):  # a factor of 0, or that is not finite
                return [number / factor if tensor.packing == "divided" else number * factor]
        case "zero points":
            wide = _of_groups(scales.astype(np.float32), shape, format)
            zeros = _of_groups(_zero_points(tensor, beside[1]).astype(np.float32), shape, format)
            return [wide, -wide * zeros]
        case "gptq" | "gptq v2" | "awq":
            zeros = _column_zeros(tensor, beside[1]).T.astype(np.float32)
            _check_groups(tensor, zeros, beside[2:])
            if format.mode == "signed":
                return [_of_groups(scales.T, shape, format)]
            wide = scales.T.astype(np.float32)
            return [_of_groups(each, shape, format) for each in (wide, -wide * zeros)]
        case "fp8" if has_fp8_blocks(shape, scales.shape):
            wide = scales.astype(np.float32) if scales.dtype.itemsize == 1 else scales
            return [np.repeat(wide, FP8_BLOCK, axis=-2)[..., : shape[-2], :]]
        case _:
            return [_of_groups(scales.astype(np.float32) if scales.dtype.itemsize == 1 else scales, shape, format)]


def reordered_numbers(tensor: Readable, stored: Sequence[Array]) -> Array:
    """Decode codes of columns whose groups are of inputs in any order, to float32 [out, in].

    Raises CheckpointError for a group that has no scale.
    """
    codes, scales, zeros, group = stored
    assert tensor.format is not None
    if group.min() < 0 or group.max() >= len(scales):
        raise CheckpointError(
            f"{tensor.stored[3]} has groups {group.min()} to {group.max()}; expected 0 to {len(scales) - 1}, those of "
            f"{tensor.stored[1]}. Fetch the checkpoint again."
        )
    code = np.ascontiguousarray(unpack(code_words(tensor, codes), tensor.format.bits, tensor.shape[1]).T)
    zero, numbers = _column_zeros(tensor, zeros), np.empty(code.shape, np.float32)
    for each, scale in enumerate(scales.astype(np.float32)):  # products of 16-bit scales with integers are exact
        own = group == each
        numbers[own] = (code[own] - zero[each].astype(np.float32)) * scale
    return numbers.T


def _of_groups(scales: Array, shape: Shape, format: QuantizationFormat) -> Array:
    """Repeat scales of rows, matrices or the tensor for each group."""
    whole = scales.reshape(()) if scales.size == 1 else scales
    return np.broadcast_to(whole, (*shape[:-1], format.groups(shape[-1])))


def _zero_points(tensor: Readable, stored: Array) -> Array:
    """Return the codes of zero, uint8 [rows, groups]; they are packed along the rows, or int8."""
    assert tensor.format is not None
    if stored.dtype == np.int8:
        return stored.view(np.uint8) ^ np.uint8(0x80)
    words = np.ascontiguousarray(stored.T).view(np.uint32)
    return unpack(words, tensor.format.bits, words.shape[1] * 32 // tensor.format.bits).T[: tensor.shape[0]]


def _column_zeros(tensor: Readable, stored: Array) -> Array:
    """Return the codes of zero, uint8 [groups, columns]."""
    assert tensor.format is not None
    if tensor.packing == "awq":
        return _unpack_awq(stored)
    return unpack(stored.view(np.uint32), tensor.format.bits, tensor.shape[0]) + np.uint8(tensor.packing == "gptq")


def _unpack_awq(stored: Array) -> Array:
    """Return 4-bit codes, uint8 [rows, columns], of int32 words in AWQ's order."""
    nibbles = unpack(stored.view(np.uint32), 4, stored.shape[1] * 8).reshape(len(stored), -1, 8)
    return nibbles[..., _AWQ_PLACES].reshape(len(stored), -1)


def _rows_of_awq(words: Array) -> Array:
    """Return words of rows [out, in / 8] from those of columns [in, out / 8]; by planes of a code of each word."""
    inputs, outputs = len(words) // 8, words.shape[1]
    columns, rows = words.reshape(inputs, 8, outputs), np.zeros((outputs, 8, inputs), np.uint32)
    for output, place in enumerate(_AWQ_PLACES):
        gathered = np.zeros((inputs, outputs), np.uint32)
        for row in range(8):
            gathered |= (columns[:, row] >> np.uint32(4 * place) & _NIBBLE) << np.uint32(4 * row)
        rows[:, output] = gathered.T
    return rows.reshape(-1, inputs)


def _columns_of_awq(words: Array) -> Array:
    """Undo `_rows_of_awq`."""
    outputs, inputs = len(words) // 8, words.shape[1]
    rows, columns = words.reshape(outputs, 8, inputs), np.zeros((inputs, 8, outputs), np.uint32)
    for row in range(8):
        gathered = np.zeros((outputs, inputs), np.uint32)
        for output, place in enumerate(_AWQ_PLACES):
            gathered |= (rows[:, output] >> np.uint32(4 * row) & _NIBBLE) << np.uint32(4 * place)
        columns[:, row] = gathered.T
    return columns.reshape(-1, outputs)


def _check_groups(tensor: Readable, zeros: Array, groups: Sequence[Array]) -> None:
    """Raise unless groups are of consecutive inputs, and zeros of symmetric codes half the range."""
    format, size = tensor.format, tensor.shape[-1]
    assert format is not None
    if format.mode == "signed" and not (zeros == 2 ** (format.bits - 1)).all():
        raise CheckpointError(
            f"{tensor.stored[2]} has codes of zero other than {2 ** (format.bits - 1)}, but config.json says that they "
            "are symmetric. Set sym to false."
        )
    if any(not np.array_equal(each, np.arange(size) // (size // zeros.shape[-1])) for each in groups):
        raise CheckpointError(
            f"{tensor.stored[3]} has other groups than those of consecutive inputs, but desc_act is false in "
            "config.json. Set it to true."
        )


def _is_integer(tensor: Readable) -> bool:
    return tensor.packing in ("signed", "zero points")
