"""The base model of an adapter: a run whose checkpoints hold only what it trained names it by path and content hash.

`<run>/base.json` has both. The hash covers config.json, the header of every safetensors file (names, dtypes, shapes and
offsets), and 1 KiB in the middle of every tensor: it is fast for any size, and every other fine-tuning of the model has
another one, but a change of a few numbers elsewhere is not noticed. Of a base that is a run, it covers the manifest of
its newest checkpoint, and so every byte.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.checkpoint.manifest import CONFIG as CHECKPOINT_CONFIG
from moezoo.core.checkpoint.manifest import read_manifest
from moezoo.core.checkpoint.safetensors_file import LazyTensors, shapes_of
from moezoo.core.checkpoint.store import check_names_and_shapes, list_checkpoints
from moezoo.core.config.run_config import Config
from moezoo.core.errors import CheckpointError, RunError
from moezoo.core.files import read_bounded, reason_of
from moezoo.core.huggingface.folder import TensorFolder
from moezoo.core.huggingface.layout import CONFIG
from moezoo.core.json_text import parse_json
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.trained import router_trains, trained_names
from moezoo.core.quantization.weight import stored
from moezoo.core.reference.router_state import updated_names
from moezoo.core.runs.run_folder import BASE_FILE, Run, is_run, is_step, run_of
from moezoo.core.runs.run_manifest import verify_run
from moezoo.core.spec import ModelSpec

_MAX_BYTES, _SAMPLE_BYTES = 1_000_000, 1024


@dataclass(frozen=True)
class Base:
    """A base model: its path or hub id, and the hash of its content."""

    path: str
    digest: str


def base_digest(folder: Path) -> str:
    """Return the hash of a base's content: of a run, or of the folder of a Hugging Face checkpoint."""
    found = hashlib.sha256()
    if is_run(folder):
        saved = [info.path for info in list_checkpoints(Run(folder).checkpoints_path)]
        newest = folder if is_step(folder) else saved[-1] if saved else None
        files = {} if newest is None else read_manifest(newest).files
        for name, file in sorted(files.items()):
            found.update(f"{name} {file.sha256}\n".encode() if name != CHECKPOINT_CONFIG else b"")
        return found.hexdigest()
    found.update(read_bounded(folder / CONFIG, 100 * _MAX_BYTES))
    tensors = TensorFolder(folder)
    for name, header in sorted(tensors.headers.items()):
        found.update(name.encode() + header)
    for sample in tensors.samples(_SAMPLE_BYTES):
        found.update(sample)
    return found.hexdigest()


def dump_base(base: Base) -> str:
    """Return the text of base.json."""
    return json.dumps({"path": base.path, "sha256": base.digest}, indent=2) + "\n"


def load_base(run: Path) -> Base | None:
    """Return the base that a run names, checked with its manifest; None if the run holds all parameters itself.

    Raises RunError: the file is damaged.
    """
    run = run_of(run)
    verify_run(run, BASE_FILE)
    try:
        content = parse_json(read_bounded(run / BASE_FILE, _MAX_BYTES))
        return Base(str(content["path"]), str(content["sha256"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{run / BASE_FILE} cannot be read ({reason_of(error)}). Restore it from a copy.") from None


def check_base(adapter: str | Path, base: Base, folder: Path) -> None:
    """Raise RunError if a folder is not the base that an adapter was trained on."""
    if base_digest(folder) != base.digest:
        raise RunError(
            f"{adapter} is an adapter for another base: it was trained on {base.path}, and the content of {folder} "
            "differs from that. Use the base that it was trained on."
        )


def saved_names(config: Config) -> frozenset[str] | None:
    """Return the names of the parameters that checkpoints of a run hold; None: all.

    A run of an adapter on the weights of `init_from` leaves out what it does not train.
    """
    spec, only = config.model, config.training.only
    if spec.adapter is None or config.init_from is None or (only is not None and "all" in only):
        return None
    names = trained_names(spec, only)
    return names | frozenset(updated_names(spec)) if router_trains(spec, names) else names


class AdaptedWeights(LazyTensors):
    """The parameters of a base, and others in place of some of them or beside them; read one at a time.

    Raises CheckpointError: a parameter of the model is in neither, or has another shape.
    """

    def __init__(self, spec: ModelSpec, base: Mapping[str, Any], own: Mapping[str, Any], where: str):
        """`where`: names the two in errors."""
        expected = {row.name: row.shape for row in parameter_table(spec)}
        found = {**{name: shape for name, shape in shapes_of(base).items() if name in expected}, **shapes_of(own)}
        check_names_and_shapes(found, expected, where)
        super().__init__(expected)
        self.base, self.own = base, own
        table = {row.name: row for row in parameter_table(spec)}
        self._float32 = {name for name, row in table.items() if not row.trained}

    def __getitem__(self, name: str) -> Any:
        value = self.own[name] if name in self.own else self.base[name]
        return np.asarray(value, np.float32) if name in self._float32 else value

    def stored(self, name: str) -> Any:
        """Return a parameter of the base as it is stored, in codes for instance."""
        return self[name] if name in self.own or name in self._float32 else stored(self.base, name)

    def stored_bytes(self, name: str) -> int | None:
        inner: Any = self.base
        return None if name in self.own else inner.stored_bytes(name)

    @property
    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """The dtype of each parameter, without reading it."""
        own: Any = getattr(self.own, "dtypes", None) or {name: value.dtype for name, value in self.own.items()}
        inner: Any = self.base
        return {name: own[name] if name in own else inner.dtypes[name] for name in self.shapes}


def own_weights(weights: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the parameters that an adapter has itself. Raises CheckpointError: the model has none."""
    if isinstance(weights, AdaptedWeights):
        return weights.own
    raise CheckpointError(f"{where} has no adapter on a base; expected one. Use --adapter with its folder.")
