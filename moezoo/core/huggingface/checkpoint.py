"""Hugging Face checkpoint folders: the parsed spec, and weights that are loaded lazily, one at a time."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import LazyTensors
from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.assembly import assemble, same_bits
from moezoo.core.huggingface.codes import CodedForm, coded_form, read_codes
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.folder import ADAPTERS, USE_ADAPTER, TensorFolder, tensor_names
from moezoo.core.huggingface.layout import CONFIG, Description, Layout, describe_config, make_layout
from moezoo.core.huggingface.ledger import Ledger, Source
from moezoo.core.huggingface.nonfinite import are_finite_scales, is_finite, is_finite_weight
from moezoo.core.huggingface.quantized_tensors import Quantized
from moezoo.core.parameters import parameter_table
from moezoo.core.quantization.weight import QuantizedWeight
from moezoo.core.spec import ModelSpec

Array = npt.NDArray[Any]


def is_checkpoint(path: str | Path) -> bool:
    """Return True if a path looks like a Hugging Face checkpoint folder (it has a config.json)."""
    return (Path(path) / CONFIG).exists()


def describe_checkpoint(path: str | Path, max_length: int | None = None) -> Description:
    """Parse a folder's config.json, and the names of tensors for its layout; an adapter beside it is noted.

    Raises SpecError or CheckpointError.
    """
    description = describe_config(Path(path) / CONFIG, max_length)
    adapter = [name for name in ADAPTERS if (Path(path) / name).exists()]
    if adapter:
        description.fields.notes.append(
            f"the adapter beside the model ({', '.join(adapter)}) is not applied. {USE_ADAPTER}".rstrip(".")
        )
    return description.in_layout(tensor_names(Path(path)))


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """An open checkpoint: all tensors are accounted for, none is loaded yet.

    `weights` is a mapping from canonical names to arrays in the dtype of the files; each access reads from disk.
    """

    path: Path
    description: Description
    folder: TensorFolder
    layout: Layout
    weights: "LazyWeights"

    @property
    def ledger(self) -> Ledger:
        """The tensor mapping: status and parameters of every tensor."""
        return self.layout.ledger

    @property
    def spec(self) -> ModelSpec:
        return self.description.spec

    def damaged_scales(self) -> list[str]:
        """Return the quantized parameters that have a scale or bias that is NaN or infinite; only these are read."""
        formats = {part: tensor.format for tensor in self.layout.readable.values() for part in tensor.stored[1:]}
        found: dict[str, None] = {}
        for entry in self.ledger.entries:
            format = formats.get(entry.name)
            if format is not None and not are_finite_scales(format, self.folder.read(entry.name)):
                found |= dict.fromkeys(entry.ours)
        return list(found)

    @property
    def family(self) -> Family:
        return self.description.family


def open_checkpoint(path: str | Path, max_length: int | None = None) -> HuggingFaceCheckpoint:
    """Open a folder and validate config, headers, index, names, shapes and dtypes, without reading tensor data.

    Raises SpecError if any field of the config is not understood. Raises CheckpointError if files are damaged,
    inconsistent, or do not match the config.
    """
    path = Path(path)
    description = describe_checkpoint(path, max_length)
    folder = TensorFolder(path)
    _check_total_size(description.spec, folder)
    layout = make_layout(description, path, folder.headers, folder.tensors, folder.read)
    weights = LazyWeights(layout.description.spec, layout.ledger, folder, Quantized(folder, layout.readable))
    return HuggingFaceCheckpoint(path, layout.description, folder, layout, weights)


class LazyWeights(LazyTensors):
    """Parameters by canonical name, each assembled from the files on access."""

    def __init__(self, spec: ModelSpec, ledger: Ledger, folder: TensorFolder, quantized: Quantized):
        super().__init__({row.name: row.shape for row in parameter_table(spec)})
        self._ledger, self._folder, self._quantized = ledger, folder, quantized
        self.nonfinite: dict[str, None] = {}  # names of the parameters read so far that contain NaN or infinity

    def __getitem__(self, name: str) -> Array:
        sources = self._ledger.sources[name]
        value = assemble(sources, self.shapes[name], self._dtype(sources), self._quantized)
        for source in self._ledger.copies:
            if source.placed.parts[0][0] == name:
                self._check_copy(source, name, value)
        if not is_finite(value):
            self.nonfinite[name] = None
        return value

    def stored(self, name: str) -> Array | QuantizedWeight:
        """Return a parameter as it is stored: as codes, if they can stay as they are, or as floats."""
        form = self._form(name)
        if not isinstance(form, CodedForm):
            return self[name]
        weight = read_codes(form, self._ledger.sources[name], self.shapes[name], self._quantized)
        for source in self._ledger.copies:
            if source.placed.parts[0][0] == name:
                self._check_copy(source, name, weight.values())
        if not is_finite_weight(weight):
            self.nonfinite[name] = None
        return weight

    def stored_bytes(self, name: str) -> int | None:
        form = self._form(name)
        return form.nbytes if isinstance(form, CodedForm) else None

    def decoded_notes(self) -> list[str]:
        """Return a line for each reason why quantized parameters are decoded when they are loaded, with their names."""
        reasons: dict[str, list[str]] = {}
        for name in self:
            form = self._form(name)
            if isinstance(form, str):
                reasons.setdefault(form, []).append(name)
        return [
            f"{len(names)} quantized parameters are decoded when the model is loaded, since {reason}: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for reason, names in reasons.items()
        ]

    def _form(self, name: str) -> CodedForm | str | None:
        return coded_form(self._ledger.sources[name], self.shapes[name], self._quantized)

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """The dtype of each parameter, without reading it."""
        return {name: self._dtype(sources) for name, sources in self._ledger.sources.items()}

    def _dtype(self, sources: tuple[Source, ...]) -> np.dtype[Any]:
        return np.result_type(*{self._quantized.dtype(source.name) for source in sources})

    def _check_copy(self, source: Source, name: str, value: Array) -> None:
        other = source.placed.holds(self._quantized.read(source.name), 0)
        if not same_bits(other, value):
            raise CheckpointError(
                f"{self._folder.path}: config.json ties the head to the embedding, but {source.name} differs from "
                f"{name}. Set tie_word_embeddings to false, or remove {source.name}."
            )


def _check_total_size(spec: ModelSpec, folder: TensorFolder) -> None:
    """Raise if the files are too small to hold the model, before any tensor names are generated."""
    numbers = sum(math.prod(row.shape) for row in parameter_table(spec))
    stored = sum(folder.size_bytes(name) for name in folder.tensors)
    if numbers > 4 * stored:  # at most four numbers per byte: no code is narrower than 2 bits
        raise CheckpointError(
            f"{folder.path / CONFIG} describes a model of {numbers:.3g} parameters, but its safetensors files have "
            f"{stored:.3g} bytes. Use the config.json that belongs to these files."
        )
