"""Safetensors files of a Hugging Face checkpoint folder, validated before use.

    FOLDER/model.safetensors                  one file, or
    FOLDER/model.safetensors.index.json       {"weight_map": {tensor name: file name}}
    FOLDER/model-00001-of-00002.safetensors   ... and its shards

Only headers and the index are read until a tensor is requested by name. Pickle files are never opened.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import SafetensorsFile
from moezoo.core.checkpoint.safetensors_header import MAX_HEADER_BYTES
from moezoo.core.errors import CheckpointError
from moezoo.core.files import open_regular, read_bounded, reason_of
from moezoo.core.json_text import parse_json

Array = npt.NDArray[Any]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")
"""Files of an adapter (LoRA) for a model, as PEFT and mlx-lm name them; they may lie beside the model."""

USE_ADAPTER = "Use it with its base model: BASE --adapter FOLDER, or moezoo.load(BASE, adapter=FOLDER)."

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin")
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
_XET_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor: the base name of its file, its safetensors dtype (`F32`, `BF16`), and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class TensorFolder:
    """The tensors of a checkpoint folder: `model.safetensors`, an index and its shards, or one other safetensors file.

    Fields:
        path: the folder.
        tensors: stored tensors by name, in the order of the files and of their headers.
        headers: raw header of each file, by the file's base name (see `SafetensorsFile.header`).

    Validates: every header (see `SafetensorsFile`); the index has base names of existing files, none of them a link
    that leaves the folder (or, in huggingface_hub's cache, the cache); each tensor of the index is in its file, each
    tensor of the files is in the index, and no tensor is in two files.

    Raises CheckpointError with the folder or file and the problem.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{path} is not a folder. Use the folder with config.json and *.safetensors.")
        index = _weight_map(self.path)
        names = _only_file(self.path) if index is None else sorted(set(index.values()))
        self._files = {name: SafetensorsFile(inside(self.path, name)) for name in names}
        self.headers = {name: file.header for name, file in self._files.items()}
        if index is not None:
            _check_index(self.path, index, self._files)
        self.tensors = {
            tensor: StoredTensor(name, entry.dtype, entry.shape)
            for name, file in self._files.items()
            for tensor, entry in file.entries.items()
        }

    def read(self, name: str, out: Array | None = None, rows: tuple[int, int] | None = None) -> Array:
        """Read a tensor or some of its rows in the stored dtype, optionally into `out`: see `SafetensorsFile.read`."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}; it has {len(self.tensors)} others.")
        return self._files[self.tensors[name].file].read(name, out, rows)

    def samples(self, size: int) -> Iterator[bytes]:
        """Yield up to `size` bytes from the middle of every tensor, in order of file and name."""
        for _, file in sorted(self._files.items()):
            with open_regular(file.path) as opened:
                for _, entry in sorted(file.entries.items()):
                    opened.seek(entry.start_byte + max(0, entry.size_bytes - size) // 2)
                    yield opened.read(min(size, entry.size_bytes))

    def size_bytes(self, name: str) -> int:
        """Return a tensor's size in its file, in bytes."""
        return self._files[self.tensors[name].file].entries[name].size_bytes


def tensor_names(folder: Path) -> list[str]:
    """Return the names of a folder's tensors as far as its small files say them; none if it has no weights yet."""
    try:
        index = _weight_map(folder)
        if index is None and (folder / SINGLE).exists():
            return list(SafetensorsFile(inside(folder, SINGLE)).entries)
    except CheckpointError:
        return []  # the problem is reported when the folder is opened
    return list(index or ())


def read_json_object(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """Read a small JSON file that is an object, without duplicate keys; `Infinity` and `NaN` are accepted.

    Raises CheckpointError with the file.
    """
    try:
        value = parse_json(read_bounded(path, max_bytes))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason_of(error)}. Fetch it again.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({reason_of(error)}). Fetch it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; got {value!r:.80}. Fetch it again.")
    return value


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Read the index's map from tensor name to file name; None if there is no index."""
    if not (folder / INDEX).exists() and not (folder / INDEX).is_symlink():
        return None
    path = inside(folder, INDEX)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names; got {weight_map!r:.80}.")
    for tensor, name in weight_map.items():
        if not _is_base_name(name):
            raise CheckpointError(
                f"{path} maps {tensor!r:.80} to {name!r:.80}; expected the base name of a safetensors file next to it."
            )
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        raise CheckpointError(f"{folder} has {SINGLE} and an index that does not list it. Remove one of the two.")
    return weight_map


def _is_base_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and name.isprintable()
        and not set(name) & {"/", "\\"}
        and len(name.encode()) < 256
    )


def _only_file(folder: Path) -> list[str]:
    if (folder / SINGLE).exists():
        return [SINGLE]
    every = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    found = [name for name in every if name not in ADAPTERS]
    if len(found) == 1:
        shard = _SHARD.fullmatch(found[0])
        if shard is None or int(shard[2]) == 1:
            return found
    if found:
        names = ", ".join(found[:3]) + (", ..." if found[3:] else "")
        raise CheckpointError(
            f"{folder} has {len(found)} safetensors files ({names}) but no {INDEX} that lists their tensors. "
            "Fetch the index too."
        )
    if every:
        raise CheckpointError(f"{folder} has an adapter ({every[0]}) but not the weights that it adapts. {USE_ADAPTER}")
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} has its weights as GGUF, which moezoo does not read. Use the safetensors of the model, or a "
            "folder of mlx-lm."
        )
    pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights as pickle ({pickles[0]}), which can run arbitrary code and is never opened. "
            "Convert them to safetensors, or fetch a revision that has safetensors."
        )
    raise CheckpointError(f"{folder} has no safetensors files; expected {SINGLE}, or {INDEX} and its shards.")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in the folder. Raises CheckpointError if it is missing or a link to elsewhere."""
    path = folder / name
    try:
        home, target = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError):
        broken = f"a link to {os.path.realpath(path)}, which is missing" if path.is_symlink() else "missing"
        raise CheckpointError(f"{path} is {broken}. Fetch the whole checkpoint again.") from None
    if target.parent != (home / name).parent and not _is_in_hub_cache(home, target):
        raise CheckpointError(f"{path} is a link to {target}, outside its folder. Replace it with the file itself.")
    return path


def _is_in_hub_cache(home: Path, target: Path) -> bool:
    """Return whether a file is where huggingface_hub's cache stores the content of a snapshot's files.

        CACHE/models--ORG--NAME/snapshots/REVISION/model.safetensors    a link to
        CACHE/models--ORG--NAME/blobs/ETAG                              the content, or a link to
        CACHE/blobs/d7/d7edf6bd...                                      the content, by its Xet hash, for all models

    Both paths are resolved, so that the cache itself may be moved or linked.
    """
    repository = home.parent.parent
    if home.parent.name != "snapshots":
        return False
    if target.parent == repository / "blobs":
        return True
    shared = repository.parent / "blobs" / target.name[:2]
    return (
        repository.name.startswith("models--")
        and target.parent == shared
        and _XET_HASH.fullmatch(target.name) is not None
    )


def _check_index(folder: Path, index: dict[str, str], files: dict[str, SafetensorsFile]) -> None:
    where: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.entries:
            if tensor in where:
                raise CheckpointError(
                    f"{folder}: {tensor!r:.80} is both in {where[tensor]} and in {name}. Fetch both again."
                )
            where[tensor] = name
    for tensor, name in index.items():
        if where.get(tensor) != name:
            actual = f"it is in {where[tensor]}" if tensor in where else "no file has it"
            raise CheckpointError(f"{folder / INDEX} maps {tensor!r:.80} to {name}, but {actual}. Fetch both again.")
    for tensor, name in where.items():
        if tensor not in index:
            raise CheckpointError(f"{folder / name} has {tensor!r:.80}, which {INDEX} does not list. Fetch both again.")
