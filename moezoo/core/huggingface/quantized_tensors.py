"""The tensors of a folder as numbers: codes and scales read together, everything else as it is stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.codecs import fp8_decode, fp8_encode, fp8_shape, mxfp4_decode, mxfp4_encode, mxfp4_shape
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.folder import StoredTensor, TensorFolder
from moezoo.core.huggingface.ledger import FLOATS, Readable

Array = npt.NDArray[Any]

_BLOCKS, _SCALES = "_blocks", "_scales"  # MXFP4
_SCALE_INV = "_scale_inv"  # FP8


@dataclass(frozen=True)
class Quantized:
    """How to read a folder whose config.json names a quantization, or none.

    Fields:
        folder: the files.
        readable: tensors that codes and scales stand for, by the name of the codes.
    """

    folder: TensorFolder
    readable: Mapping[str, Readable]

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype that a tensor is read in."""
        tensor = self.readable.get(name)
        return numpy_dtype(self.folder.tensors[name].dtype if tensor is None else tensor.dtype)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """A tensor as numbers, or some rows of one that `has_rows`."""
        if name not in self.readable:
            return self.folder.read(name, rows=rows)
        codes, scales = (self.folder.read(part, rows=rows) for part in self.readable[name].stored)
        return decode(name, codes, scales)

    def has_rows(self, name: str) -> bool:
        """Whether the first axis of a tensor is that of all that it is read from (FP8 has one scale for 128 rows)."""
        stored = self.readable[name].stored if name in self.readable else (name,)
        shapes = [self.folder.tensors[part].shape for part in stored]
        return all(shape and shape[0] == shapes[0][0] for shape in shapes)

    def size_bytes(self, name: str) -> int:
        """How many bytes a tensor takes as numbers."""
        shape = self.readable[name].shape if name in self.readable else self.folder.tensors[name].shape
        return math.prod(shape) * self.dtype(name).itemsize

    def is_plain(self, name: str) -> bool:
        """Whether a tensor is stored as its numbers."""
        return name not in self.readable or self.readable[name].stored == (name,)


def encode(name: str, value: Array, scales: Array, kept: Array | None = None) -> Array:
    """The codes of a tensor under given scales. Raises CheckpointError where no code stands for a number."""
    return (mxfp4_encode if name.endswith(_BLOCKS) else fp8_encode)(value, scales, kept)


def decode(name: str, codes: Array, scales: Array) -> Array:
    """The numbers of a tensor: bfloat16 of MXFP4, float32 of FP8; both exactly."""
    return (mxfp4_decode if name.endswith(_BLOCKS) else fp8_decode)(codes, scales)


def numpy_dtype(stored: str) -> np.dtype[Any]:
    """NumPy's dtype of a stored float."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if stored == "BF16" else FLOATS[stored])


def quantized_tensors(fields: Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Readable]:
    """Tensors that codes and scales stand for, by the name of the codes, as `quantization_config` says.

    Raises SpecError for a method that is not known.
    """
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
                    found[name] = Readable("BF16", shape, (name, scales))
        case "fp8":
            size = config.get("weight_block_size", [128, 128])
            if size != [128, 128]:
                raise config.refuse("weight_block_size", "[128, 128]")
            for name, tensor in tensors.items():
                scales = name + _SCALE_INV
                if tensor.dtype == "F8_E4M3" and scales in tensors:
                    _check_dtype(tensors, scales, ("F32", "BF16", "F8_E8M0"))
                    shape = fp8_shape(_where(tensors, name), tensor.shape, tensors[scales].shape)
                    found[name] = Readable("F32", shape, (name, scales))
        case _:
            raise SpecError(
                f"quantization_config.quant_method is {method!r}; expected mxfp4 or fp8 ({fields.where}). "
                "Use the checkpoint without this quantization."
            )
    return found


def _where(tensors: Mapping[str, StoredTensor], name: str) -> str:
    return f"{tensors[name].file}: {name}"


def _check_dtype(tensors: Mapping[str, StoredTensor], scales: str, expected: tuple[str, ...]) -> None:
    if tensors[scales].dtype not in expected:
        raise CheckpointError(
            f"{_where(tensors, scales)} is {tensors[scales].dtype}; expected {' or '.join(expected)} for scales."
        )
