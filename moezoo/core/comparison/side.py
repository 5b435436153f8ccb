"""A model to compare, with what belongs to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moezoo.core.backend import Model
from moezoo.core.config.run_config import Config
from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.distributed.mesh import ONE_DEVICE, Devices
from moezoo.core.parameters.precision import compute_dtype


class Loaded(Protocol):
    """A loaded model (`moezoo.api.LoadedModel`), as far as a comparison reads it."""

    model: Model
    config: Config
    tokenizer: Tokenizer
    step: int
    published: bool
    devices: Devices
    allow_overcommit: bool
    path: Path
    backend: str

    @property
    def first_token(self) -> int | None: ...


@dataclass(frozen=True)
class Side:
    """A model to compare.

    Fields:
        name: of the model in the report, its path for instance.
        model: the model.
        backend: name of its backend.
        config: of its run; for a Hugging Face checkpoint as `open_model` returns it.
        tokenizer: its tokenizer.
        first_token: begins each window of a published model that has one.
        devices: that the model is on.
        allow_overcommit: try what needs more memory than is free.
    """

    name: str
    model: Model
    backend: str
    config: Config
    tokenizer: Tokenizer
    first_token: int | None = None
    devices: Devices = ONE_DEVICE
    allow_overcommit: bool = False

    @property
    def compute(self) -> str:
        """Dtype of activations."""
        return compute_dtype(self.model.spec)

    def describe(self) -> str:
        """Return name, backend and precision in a line."""
        return f"{self.name} ({self.backend}, {self.compute})"


def side_of(loaded: Loaded, name: str) -> Side:
    """Return a loaded model as a side; the step of a run is added to its name."""
    return Side(
        name=f"{name}, step {loaded.step}" if loaded.step else name,
        model=loaded.model,
        backend=loaded.backend,
        config=loaded.config,
        tokenizer=loaded.tokenizer,
        first_token=loaded.first_token if loaded.published else None,
        devices=loaded.devices,
        allow_overcommit=loaded.allow_overcommit,
    )
