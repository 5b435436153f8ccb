"""A folder of a Hugging Face checkpoint: a spec, and its weights, read one by one when they are asked for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import ReadWhenAsked
from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.assembly import assemble, same_bits
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.folder import TensorFolder
from moezoo.core.huggingface.layout import CONFIG, Description, Layout, describe_config, make_layout
from moezoo.core.huggingface.ledger import Ledger, Source
from moezoo.core.huggingface.nonfinite import is_finite
from moezoo.core.huggingface.quantized_tensors import Quantized
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec

Array = npt.NDArray[Any]


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a folder that looks like a Hugging Face checkpoint."""
    return (Path(path) / CONFIG).is_file()


def describe_checkpoint(path: str | Path, max_length: int | None = None) -> Description:
    """The model of a folder's config.json, without a look at its tensors. Raises SpecError or CheckpointError."""
    return describe_config(Path(path) / CONFIG, max_length)


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A checkpoint whose every tensor is accounted for, and none of which is read yet.

    `weights` is a mapping from canonical names to arrays in the dtype of the files; each access reads anew.
    """

    path: Path
    description: Description
    folder: TensorFolder
    layout: Layout
    weights: "LazyWeights"

    @property
    def ledger(self) -> Ledger:
        """What becomes of every tensor."""
        return self.layout.ledger

    @property
    def spec(self) -> ModelSpec:
        return self.description.spec

    @property
    def family(self) -> Family:
        return self.description.family


def open_checkpoint(path: str | Path, max_length: int | None = None) -> HuggingFaceCheckpoint:
    """Open a folder and check it: config, headers, index, names, shapes, dtypes; no tensor is read.

    Raises SpecError: a config that is not understood whole. Raises CheckpointError: files that are damaged, lie, or do
    not fit the config.
    """
    path = Path(path)
    description = describe_checkpoint(path, max_length)
    folder = TensorFolder(path)
    _refuse_another_size(description.spec, folder)
    layout = make_layout(description, path, folder.headers, folder.tensors, folder.read)
    weights = LazyWeights(description.spec, layout.ledger, folder, Quantized(folder, layout.readable))
    return HuggingFaceCheckpoint(path, description, folder, layout, weights)


class LazyWeights(ReadWhenAsked):
    """Parameters by canonical name, each put together from the files when it is asked for."""

    def __init__(self, spec: ModelSpec, ledger: Ledger, folder: TensorFolder, quantized: Quantized):
        super().__init__({row.name: row.shape for row in parameter_table(spec)})
        self._ledger, self._folder, self._quantized = ledger, folder, quantized
        self.nonfinite: dict[str, None] = {}  # names of parameters with NaN or infinity, of those read so far

    def __getitem__(self, name: str) -> Array:
        sources = self._ledger.sources[name]
        value = assemble(sources, self.shapes[name], self._dtype(sources), self._quantized)
        for source in self._ledger.copies:
            if source.placed.parts[0][0] == name:
                self._check_copy(source, name, value)
        if not is_finite(value):
            self.nonfinite[name] = None
        return value

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """The dtypes that all come in, without reading one."""
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


def _refuse_another_size(spec: ModelSpec, folder: TensorFolder) -> None:
    """Raise where no files of this size can hold the model, before a name is made for each of its tensors."""
    numbers = sum(math.prod(row.shape) for row in parameter_table(spec))
    stored = sum(folder.size_bytes(name) for name in folder.tensors)
    if numbers > 2 * stored:  # two numbers a byte: no stored dtype is narrower than 4 bits
        raise CheckpointError(
            f"{folder.path / CONFIG} describes a model of {numbers:.3g} numbers, but its safetensors files hold "
            f"{stored:.3g} bytes. Use the config.json of these files."
        )
