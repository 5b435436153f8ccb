"""Reader of a folder's tensors: quantized ones are decoded from codes and scales, others are read as stored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.assembly import same_bits
from moezoo.core.huggingface.codecs import (
    fp8_decode,
    fp8_encode,
    mxfp4_decode,
    mxfp4_encode,
)
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.folder import StoredTensor, TensorFolder
from moezoo.core.huggingface.ledger import FLOATS, INTEGERS, Readable
from moezoo.core.huggingface.mlx_quantization import declared, mlx_tensors
from moezoo.core.huggingface.quantization_methods import transformers_tensors
from moezoo.core.huggingface.stored_rows import code_words, group_scales, has_rows, reordered_numbers
from moezoo.core.quantization.weight import decode_rows

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Quantized:
    """Tensors of a folder as floats, decoded if config.json declares a quantization.

    Fields:
        folder: the files.
        readable: quantized tensors, by the name that their numbers would have.
    """

    folder: TensorFolder
    readable: Mapping[str, Readable]

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the dtype that a tensor is read as."""
        tensor = self.readable.get(name)
        return numpy_dtype(self.folder.tensors[name].dtype if tensor is None else tensor.dtype)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """Read and decode a tensor, or a range of its rows if `has_rows`."""
        if name not in self.readable:
            return self.folder.read(name, rows=rows)
        tensor = self.readable[name]
        return decode(tensor, [self.folder.read(part, rows=rows) for part in tensor.stored])

    def read_into(self, name: str, out: Array) -> None:
        """Read a plain tensor into a contiguous array of its shape and dtype."""
        self.folder.read(name, out=out)

    def has_rows(self, name: str) -> bool:
        """Return True if codes and scales have equal rows, so rows can be read. Blocks of FP8 have fewer."""
        tensor = self.readable.get(name)
        if tensor is None:
            return self.have_rows(self.folder.tensors[name].shape, (name,))
        return has_rows(tensor) and self.have_rows(tensor.shape, tensor.stored)

    def have_rows(self, shape: tuple[int, ...], parts: Sequence[str]) -> bool:
        """Return True if these stored tensors have the rows of a tensor of this shape."""
        shapes = [self.folder.tensors[part].shape for part in parts]
        several = len(parts) > 1
        return bool(shape) and all(len(each) > several and each[0] == shape[0] for each in shapes)

    def size_bytes(self, name: str) -> int:
        """Return the size of the decoded tensor, in bytes."""
        shape = self.readable[name].shape if name in self.readable else self.folder.tensors[name].shape
        return math.prod(shape) * self.dtype(name).itemsize

    def is_plain(self, name: str) -> bool:
        """Return True if a tensor is stored without quantization."""
        return name not in self.readable or self.readable[name].stored == (name,)


def encode(tensor: Readable, value: Array, beside: Sequence[Array], kept: Array | None = None) -> Array:
    """Encode a tensor with these scales and biases; `kept`: its original codes.

    Raises CheckpointError if a value has no exact code, or if values of codes in words have changed.
    """
    format = tensor.format
    assert format is not None
    if is_packed(tensor):
        if kept is None or not same_bits(decode(tensor, [kept, *beside]), value):
            raise CheckpointError(f"{tensor.stored[0]} has changed and cannot be encoded exactly.")
        return kept
    return (mxfp4_encode if format.mode == "mxfp4" else fp8_encode)(value, beside[0], kept)


def decode(tensor: Readable, arrays: Sequence[Array]) -> Array:
    """Decode a tensor from its codes and what is beside them: MXFP4 of gpt-oss to bfloat16, others to float32."""
    format = tensor.format
    assert format is not None
    if tensor.reordered:
        return reordered_numbers(tensor, arrays)
    if is_packed(tensor):
        scales, *biases = group_scales(tensor, arrays[1:], len(arrays[0]) if has_rows(tensor) else None)
        codes = code_words(tensor, arrays[0])
        return decode_rows(format, codes, scales, biases[0] if biases else None, tensor.shape[-1])
    return (mxfp4_decode if format.mode == "mxfp4" else fp8_decode)(*arrays)


def is_packed(tensor: Readable) -> bool:
    """Return True for codes that are only kept: different ones may mean the same number, after rounding.

    Changed numbers in MXFP4 of gpt-oss and in FP8 are encoded again where codes have them exactly.
    """
    return tensor.format is not None and tensor.packing not in ("blocks", "fp8")


def numpy_dtype(stored: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a safetensors dtype of plain tensors."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if stored == "BF16" else (FLOATS | INTEGERS)[stored])


def quantized_tensors(
    fields: Fields, tensors: Mapping[str, StoredTensor], undeclared: Fields | None = None
) -> dict[str, Readable]:
    """Return the tensors quantized according to config.json, by the name that their numbers would have.

    `undeclared`: the `quantization_config` of files whose config.json has none.

    Raises SpecError for an unsupported method, CheckpointError for codes and scales that do not belong together.
    """
    formats = declared(fields)
    if formats is not None:
        return mlx_tensors(*formats, tensors)
    config = fields.inside("quantization_config") or undeclared
    return {} if config is None else transformers_tensors(config, tensors)
