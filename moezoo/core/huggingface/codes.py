"""Parameters that stay in codes: assembled from the codes, scales and biases of checkpoint tensors without decoding.

The rules of the tensor mapping apply to codes as to numbers, with the packed axis counted in words, and to scales, with
that axis counted in groups: parts of a tensor are rows of its codes, and tensors of experts are stacked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_header import size_bytes
from moezoo.core.huggingface.assembly import assemble
from moezoo.core.huggingface.codecs import FP8_BLOCK, has_fp8_blocks
from moezoo.core.huggingface.ledger import FLOATS, Readable, Source
from moezoo.core.huggingface.quantized_tensors import Quantized, numpy_dtype
from moezoo.core.huggingface.tensors import Placed
from moezoo.core.quantization.formats import WORD_BITS, QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight

Array = npt.NDArray[Any]

_CODES, _SCALES, _BIASES = range(3)


class CodedForm(NamedTuple):
    """Form of a parameter in codes, known without reading any: as in `QuantizedWeight`, and its size in bytes."""

    format: QuantizationFormat
    lead: tuple[int, ...]
    packed: tuple[int, ...]
    nbytes: int


def coded_form(sources: Sequence[Source], shape: tuple[int, ...], quantized: Quantized) -> CodedForm | str | None:
    """Return the form of a parameter that can stay in codes; why it is decoded, if it cannot; None if it has none."""
    tensors = [quantized.readable.get(source.name) for source in sources]
    formats = {None if tensor is None else tensor.format for tensor in tensors}
    if formats == {None}:
        return None
    if len(formats) > 1:
        return "their tensors have several formats"
    format = formats.pop()
    assert format is not None
    dtypes = {_Stored(quantized, which).dtype(source.name) for source in sources for which in _parts(format)[1:]}
    axes = {source.placed.packed(source.place) for source in sources}
    known = next(iter(axes))
    if len(dtypes) > 1:
        return "their scales have several dtypes"
    if format.mode == "fp8" and not all(_Stored(quantized, _SCALES).has_blocks(source.name) for source in sources):
        return "their scales are of channels or whole tensors"
    if len(axes) > 1 or known is None:
        return "they have only parts of rows of codes"
    lead, packed = known
    rows, size = math.prod(shape[axis] for axis in lead), math.prod(shape[axis] for axis in packed)
    if not lead or not format.divides(size):
        return f"groups do not divide their rows of {size} numbers"
    beside = format.groups(size) * dtypes.pop().itemsize * (len(_parts(format)) - 1)
    return CodedForm(format, lead, packed, rows * (format.words(size) * WORD_BITS // 8 + beside))


def read_codes(
    form: CodedForm, sources: Sequence[Source], shape: tuple[int, ...], quantized: Quantized
) -> QuantizedWeight:
    """Read a parameter's codes, in pieces as `assemble`."""
    rows, size = tuple(shape[axis] for axis in form.lead), math.prod(shape[axis] for axis in form.packed)

    def read(which: int) -> Array:
        reader, words = _Stored(quantized, which), (form.format.groups if which else form.format.words)(size)
        moved = [source._replace(placed=source.placed.in_words(source.place, words)) for source in sources]
        apart = (*rows, words, *(1 for _ in form.packed[1:]))
        return assemble(moved, apart, reader.dtype(sources[0].name), reader).reshape(*rows, words)

    return QuantizedWeight(form.format, shape, form.lead, form.packed, *(read(which) for which in _parts(form.format)))


def written_codes(placed: Placed, weights: Sequence[QuantizedWeight]) -> list[Array]:
    """Return codes in words, scales and biases of a checkpoint tensor from its parameters: undoes `read_codes`."""
    format, written = weights[0].format, []
    for which in _parts(format):
        words = (format.groups if which else format.words)(placed.shape[-1])
        parts: list[Any] = [(weight.codes, weight.scales, weight.biases)[which] for weight in weights]
        array = np.empty((*placed.shape[:-1], words), parts[0].dtype)
        for place, part in enumerate(parts):
            expert = placed.parts[place][1]  # stacked outside of everything else
            placed.in_words(place, words).put(array, place, part if expert is None else part[expert])
        is_repeated = format.mode == "fp8" and which != _CODES
        written.append(array[..., ::FP8_BLOCK, :] if is_repeated else array)
    return written


def _parts(format: QuantizationFormat) -> tuple[int, ...]:
    return (_CODES, _SCALES, _BIASES) if format.has_biases else (_CODES, _SCALES)


@dataclass(frozen=True)
class _Stored:
    """Codes as words, or scales, or biases, by the name of the codes."""

    quantized: Quantized
    which: int

    def _tensor(self, name: str) -> tuple[Readable, str]:
        tensor = self.quantized.readable[name]
        return tensor, tensor.stored[self.which]

    def dtype(self, name: str) -> np.dtype[Any]:
        tensor, part = self._tensor(name)
        assert tensor.format is not None
        if self.which == _CODES:
            return np.dtype(np.uint32)
        stored = self.quantized.folder.tensors[part].dtype
        if tensor.format.mode == "fp8":
            return numpy_dtype("F32" if stored == "F8_E8M0" else stored)
        return numpy_dtype(stored) if tensor.format.has_biases else np.dtype(np.uint8)

    def has_blocks(self, name: str) -> bool:
        """Return True if FP8 scales are of blocks."""
        tensor, part = self._tensor(name)
        return has_fp8_blocks(tensor.shape, self.quantized.folder.tensors[part].shape)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        tensor, part = self._tensor(name)
        array = self.quantized.folder.read(part, rows=rows)
        if self.which == _CODES:
            outer = array.shape[: len(tensor.shape) - 1]
            return array.reshape(*outer, -1).view(np.uint8).view(np.uint32)
        assert tensor.format is not None
        if tensor.format.mode == "fp8":  # one scale per block; here one per row of codes
            repeated = np.repeat(array.astype(self.dtype(name)), FP8_BLOCK, axis=-2)
            return repeated[..., : tensor.shape[-2], :]
        return array if tensor.format.has_biases else array.view(np.uint8)

    def read_into(self, name: str, out: Array) -> None:
        self.quantized.folder.read(self._tensor(name)[1], out=out)

    def has_rows(self, name: str) -> bool:
        tensor, part = self._tensor(name)
        shape = self.quantized.folder.tensors[part].shape
        return len(shape) > 0 and shape[0] == tensor.shape[0]

    def is_plain(self, name: str) -> bool:
        tensor, part = self._tensor(name)
        stored = self.quantized.folder.tensors[part]
        known = ("U32",) if self.which == _CODES else ("U8", *FLOATS)
        return stored.dtype in known and stored.shape[:-1] == tensor.shape[:-1]

    def size_bytes(self, name: str) -> int:
        stored = self.quantized.folder.tensors[self._tensor(name)[1]]
        return size_bytes(stored.dtype, stored.shape)
