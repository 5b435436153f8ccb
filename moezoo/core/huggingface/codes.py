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
from moezoo.core.huggingface.ledger import FLOATS, Readable, Source
from moezoo.core.huggingface.quantized_tensors import Quantized
from moezoo.core.huggingface.stored_rows import code_words, group_scales, has_group_scales, has_rows, scale_dtype
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
    if not all(_Stored(quantized, _SCALES).has_groups(source.name) for source in sources):
        return "their scales are of columns"
    if any(quantized.readable[source.name].reordered for source in sources):
        return "their groups are of inputs in any order (desc_act)"
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
        written.append(array)
    return written


def _parts(format: QuantizationFormat) -> tuple[int, ...]:
    return (_CODES, _SCALES, _BIASES) if format.has_biases else (_CODES, _SCALES)


@dataclass(frozen=True)
class _Stored:
    """Codes as words, or scales, or biases, by the name of the codes."""

    quantized: Quantized
    which: int

    def _parts(self, name: str) -> tuple[Readable, tuple[str, ...]]:
        """Return the tensor, and the stored tensors that are read."""
        tensor = self.quantized.readable[name]
        return tensor, tensor.stored[:1] if self.which == _CODES else tensor.stored[1:]

    def dtype(self, name: str) -> np.dtype[Any]:
        tensor = self.quantized.readable[name]
        if self.which == _CODES:
            return np.dtype(np.uint32)
        return scale_dtype(tensor, self.quantized.folder.tensors[tensor.stored[1]].dtype)

    def has_groups(self, name: str) -> bool:
        """Return True if each group has a scale."""
        tensor = self.quantized.readable[name]
        return has_group_scales(tensor, self.quantized.folder.tensors[tensor.stored[1]].shape)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        tensor, parts = self._parts(name)
        arrays = [self.quantized.folder.read(part, rows=rows) for part in parts]
        if self.which == _CODES:
            return code_words(tensor, arrays[0])
        return group_scales(tensor, arrays, None if rows is None else rows[1] - rows[0])[self.which - 1]

    def read_into(self, name: str, out: Array) -> None:
        self.quantized.folder.read(self._only(name), out=out)

    def has_rows(self, name: str) -> bool:
        tensor, parts = self._parts(name)
        return has_rows(tensor) and self.quantized.have_rows(tensor.shape, parts)

    def is_plain(self, name: str) -> bool:
        stored = self.quantized.folder.tensors[self._only(name)]
        if self.which == _CODES:
            return stored.dtype == "U32"
        tensor = self.quantized.readable[name]
        assert tensor.format is not None
        form = (*tensor.shape[:-1], tensor.format.groups(tensor.shape[-1]))
        return (
            tensor.packing in ("words", "blocks", "bytes", "signed")
            and stored.dtype in ("U8", *FLOATS)
            and stored.shape == form
        )

    def size_bytes(self, name: str) -> int:
        _, parts = self._parts(name)
        forms = [self.quantized.folder.tensors[part] for part in parts]
        return sum(size_bytes(form.dtype, form.shape) for form in forms)

    def _only(self, name: str) -> str:
        """Return the stored tensor of codes, scales or biases as mlx-lm has them."""
        return self.quantized.readable[name].stored[self.which]
