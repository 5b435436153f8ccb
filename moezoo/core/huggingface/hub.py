"""Download of published checkpoints by hub id: weights, JSON and chat templates.

Of the weights only the files listed in the index are downloaded, since many repositories have a second copy in another
layout.
"""

import glob
from pathlib import Path

from moezoo.core.data.tokenizer_files import TEMPLATES, TEXT_FILES
from moezoo.core.errors import CheckpointError
from moezoo.core.hub import PartlyCached, Snapshot, hub_id, readable_errors
from moezoo.core.huggingface.folder import ADAPTERS, INDEX, SINGLE, USE_ADAPTER, read_json_object
from moezoo.core.progress import Progress

_SMALL_FILES = ("*.json", "*.jinja")  # config, index, tokenizer, generation config; chat templates
_TO_DESCRIBE = ("config.json", *TEXT_FILES)
_TO_OPEN = (*_TO_DESCRIBE, INDEX, "generation_config.json")
_LOCAL = "Or pass the path of a local folder with config.json and *.safetensors."


def resolve(path_or_id: str | Path, on_progress: Progress | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a checkpoint: a local path unchanged, or `organization/name[@revision]` in the hub's cache.

    `hub_id` decides which it is. Cached files are not downloaded again. If the hub does not answer, the cache must have
    what is needed to open the model. `on_progress` is called with bytes, at most five times a second. With
    `weights=False` only JSON and templates are downloaded, which is enough to describe a model.

    Raises CheckpointError if there is no network, no such repository or revision, no access, or no weights.
    """
    repository = hub_id(path_or_id)
    if repository is None:
        return Path(path_or_id)
    with readable_errors(repository, CheckpointError, _LOCAL):
        return _download(Snapshot(repository), repository.name, on_progress, weights)


def _download(snapshot: Snapshot, name: str, on_progress: Progress | None, with_weights: bool) -> Path:
    folder = snapshot.fetch(_SMALL_FILES, _TO_OPEN if with_weights else _TO_DESCRIBE)
    if not (folder / "config.json").exists():
        problem = f"{name} has no config.json, so it cannot be opened as a checkpoint. {_LOCAL}"
        if (folder / ADAPTERS[0]).exists():
            raise CheckpointError(f"{name} is an adapter, without the model that it adapts. {USE_ADAPTER}")
        raise PartlyCached(["config.json"]) if snapshot.offline else CheckpointError(problem)
    snapshot.fetch([f"{TEMPLATES}/*.jinja"])
    if not with_weights:
        return folder
    for weights in _weights(folder):
        snapshot.fetch(weights, on_progress=on_progress)
        if any(folder.glob("*.safetensors")):
            return folder
    problem = f"{name} has no safetensors files, and pickle is never downloaded. Convert it, or use another. {_LOCAL}"
    raise PartlyCached(["*.safetensors"]) if snapshot.offline else CheckpointError(problem)


def _weights(folder: Path) -> list[list[str]]:
    """Return lists of file name patterns to try in order."""
    if (folder / INDEX).exists():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        if isinstance(weight_map, dict):  # TensorFolder reports all other problems with it
            names = {name for name in weight_map.values() if isinstance(name, str) and name.endswith(".safetensors")}
            return [[glob.escape(name) for name in sorted(names)]]
    return [[SINGLE], ["*.safetensors"]]
