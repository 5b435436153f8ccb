"""Reader of a folder's tensors: quantized ones are decoded from codes and scales, others are read as stored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.assembly import same_bits
from moezoo.core.huggingface.codecs import (
    FP8_BLOCK,
    fp8_decode,
    fp8_encode,
    fp8_shape,
    mxfp4_decode,
    mxfp4_encode,
    mxfp4_shape,
)
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.folder import StoredTensor, TensorFolder
from moezoo.core.huggingface.ledger import FLOATS, INTEGERS, Readable
from moezoo.core.huggingface.mlx_quantization import declared, mlx_tensors
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.weight import decode_rows

Array = npt.NDArray[Any]

_BLOCKS, _SCALES = "_blocks", "_scales"  # MXFP4
_SCALE_INV, _SCALE = "_scale_inv", "_scale"  # FP8
_METHODS = ("mxfp4", "fp8", "fbgemm_fp8", "compressed-tensors")


@dataclass(frozen=True)
class Quantized:
    """Tensors of a folder as floats, decoded if config.json declares a quantization.

    Fields:
        folder: the files.
        readable: quantized tensors, by the name of their codes.
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
        return self.have_rows(self.folder.tensors[name].shape, (name,) if tensor is None else tensor.stored)

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
    """Decode a tensor from its codes, scales and biases: MXFP4 of transformers to bfloat16, others to float32."""
    format = tensor.format
    assert format is not None
    if is_packed(tensor):
        codes, scales, *biases = arrays
        return decode_rows(format, codes, scales, biases[0] if biases else None, tensor.shape[-1])
    return (mxfp4_decode if format.mode == "mxfp4" else fp8_decode)(*arrays)


def is_packed(tensor: Readable) -> bool:
    """Return True for codes in words, as mlx-lm has them: different codes may mean the same number, after rounding.

    Those of transformers are bytes.
    """
    return tensor.format is not None and tensor.format.mode != "fp8" and not tensor.stored[0].endswith(_BLOCKS)


def numpy_dtype(stored: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a safetensors dtype of plain tensors."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if stored == "BF16" else (FLOATS | INTEGERS)[stored])


def quantized_tensors(fields: Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Readable]:
    """Return the tensors quantized according to config.json, by the name of their codes.

    Raises SpecError for an unsupported method, CheckpointError for codes and scales that do not belong together.
    """
    formats = declared(fields)
    if formats is not None:
        return mlx_tensors(*formats, tensors)
    config = fields.inside("quantization_config")
    if config is None:
        return {}
    method = config.text("quant_method", "none")
    found: dict[str, Readable] = {}
    match method:
        case "mxfp4":
            for name, tensor in tensors.items():
                scales = name.removesuffix(_BLOCKS) + _SCALES
                if name.endswith(_BLOCKS) and tensor.dtype == "U8" and scales in tensors:
                    _check_dtype(tensors, scales, ("U8", "F8_E8M0"))
                    shape = mxfp4_shape(_where(tensors, name), tensor.shape, tensors[scales].shape)
                    found[name] = Readable("BF16", shape, (name, scales), QuantizationFormat("mxfp4", 4, 32))
        case "fp8":
            size = None if config.null("weight_block_size") else config.get("weight_block_size", [128, 128])
            if size not in (None, [128, 128]):
                raise config.refuse("weight_block_size", "[128, 128] or null")
            found = _fp8_tensors(tensors, _SCALE_INV)
        case "fbgemm_fp8":
            found = _fp8_tensors(tensors, _SCALE)
        case "compressed-tensors":
            _check_float_quantized(config)
            found = _fp8_tensors(tensors, _SCALE)
        case _:
            raise SpecError(
                f"quantization_config.quant_method is {method!r:.80}; expected one of {', '.join(_METHODS)}, or "
                f"mlx-lm's quantization ({fields.where}). Use an unquantized version of the checkpoint, or mlx-lm's."
            )
    return found


def _fp8_tensors(tensors: Mapping[str, StoredTensor], ending: str) -> dict[str, Readable]:
    """Return the tensors of E4M3 codes whose scales have the same name with this ending."""
    found = {}
    for name, tensor in tensors.items():
        scales = name + ending
        if tensor.dtype == "F8_E4M3" and scales in tensors:
            _check_dtype(tensors, scales, ("F32", "BF16", "F8_E8M0"))
            shape = fp8_shape(_where(tensors, name), tensor.shape, tensors[scales].shape)
            found[name] = Readable("F32", shape, (name, scales), QuantizationFormat("fp8", 8, 128))
    return found


def _check_float_quantized(config: Fields) -> None:
    """Raise SpecError unless all groups of a config of compressed-tensors are E4M3 weights with symmetric scales."""
    groups = config.inside("config_groups")
    if config.get("format") != "float-quantized" or groups is None:
        raise config.refuse("format", '"float-quantized", with config_groups')
    for name in groups.raw:
        inner = groups.inside(name)
        weights = None if inner is None else inner.inside("weights")
        if weights is None:
            raise groups.refuse(name, "an object with weights")
        weights.expect("type", "float")
        weights.expect("num_bits", 8)
        weights.expect("symmetric", True)
        weights.expect("strategy", "tensor", "channel", "block")
        weights.expect("block_structure", [FP8_BLOCK, FP8_BLOCK], f"{FP8_BLOCK}x{FP8_BLOCK}")


def _where(tensors: Mapping[str, StoredTensor], name: str) -> str:
    return f"{tensors[name].file}: {name}"


def _check_dtype(tensors: Mapping[str, StoredTensor], scales: str, expected: tuple[str, ...]) -> None:
    if tensors[scales].dtype not in expected:
        raise CheckpointError(
            f"{_where(tensors, scales)} is {tensors[scales].dtype}; expected {' or '.join(expected)} for scales. Fetch "
            "the checkpoint again."
        )
