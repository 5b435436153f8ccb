"""File layout of a checkpoint and its unmapped tensors: everything an export needs besides the weights.

A run that started from a Hugging Face checkpoint stores this, so that its weights can be exported to the same files:

    <run>/huggingface/config.json, generation_config.json, ...   copies
    <run>/huggingface/headers.json                               {file: its header}
    <run>/huggingface/kept.safetensors                           tensors that are kept verbatim, and scales
"""

import json
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import SafetensorsFile, write_stream
from moezoo.core.checkpoint.safetensors_header import encode_header
from moezoo.core.data.tokenizer_files import TEMPLATES
from moezoo.core.errors import CheckpointError
from moezoo.core.files import copy_file, make_folder, read_bounded, write_atomically
from moezoo.core.huggingface.family import Family, family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.folder import ADAPTERS, StoredTensor, inside, read_json_object
from moezoo.core.huggingface.ledger import Ledger, Readable, make_ledger
from moezoo.core.huggingface.quantized_tensors import decode, encode, is_packed, quantized_tensors
from moezoo.core.huggingface.tensors import Fused
from moezoo.core.json_text import parse_json
from moezoo.core.spec import ModelSpec

Array = npt.NDArray[Any]

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"
"""Declares what ModelOpt has quantized, in place of `quantization_config` or beside it."""
HEADERS, _KEPT = "headers.json", "kept.safetensors"
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")  # files copied along with the tensors; never code or pickle
_MAX_HEADERS_BYTES = 500_000_000  # one header in the file may have 100 MB
MAX_SMALL_BYTES = 100_000_000
"""Largest file beside the tensors that is copied with a checkpoint."""


@dataclass(frozen=True)
class Description:
    """A parsed config.json, and the tensor mapping that it describes.

    Fields:
        family, fields, spec: the model.
        rules: the family's tensor mapping, in the layout of the files.
        lacks: a part of the model in config.json that the files lack, since mlx-lm drops it.
    """

    family: Family
    fields: Fields
    spec: ModelSpec
    rules: tuple[Fused, ...]
    lacks: str | None = None

    def in_layout(self, names: Collection[str]) -> "Description":
        """Return the description of files with tensors of these names.

        In mlx-lm's layout a zero-centred norm has its scale plus one: it is a learned one, in most families. What
        mlx-lm drops, or what the published files may lack, is no part of the model if its tensors are not there.
        """
        if not self.family.has_mlx_names(names):
            optional = self.family.may_lack
            there = optional is None or any(name.endswith(optional[1]) for name in names)
            return self if there or optional is None else replace(self, spec=_without(self.spec, optional[0]))
        spec = self.spec if self.family.mlx_lm.zero_centred else with_learned_norms(self.spec)
        drops, lacks = self.family.mlx_lm.drops, None
        if drops is not None and not any(name.endswith(drops[1]) for name in names):
            lacks = drops[0]
            note = f"these files of mlx-lm lack {lacks}, which it drops; the model is computed without, as there"
            self.fields.notes += [note] if note not in self.fields.notes else []
            spec = _without(spec, lacks)
        return replace(self, spec=spec, rules=self.family.mlx_tensors, lacks=lacks)

    @property
    def notes(self) -> list[str]:
        """One-line notes for the user, e.g. on unsupported training options."""
        return self.fields.notes


@dataclass(frozen=True)
class Layout:
    """File and position of every tensor of a checkpoint.

    Fields:
        path: the folder of config.json and the other small files.
        headers: each file's header, as bytes.
        tensors: stored tensors by name.
        readable: quantized tensors, by the name that their numbers would have.
        stored: names of the tensors that `read` can load: at least those kept verbatim, and scales.
        read: loads one of `stored`.
    """

    description: Description
    path: Path
    headers: Mapping[str, bytes]
    tensors: Mapping[str, StoredTensor]
    readable: Mapping[str, Readable]
    ledger: Ledger
    stored: frozenset[str]
    read: Callable[[str], Array]

    def kept_names(self) -> list[str]:
        """Names of tensors that are exported verbatim."""
        return [entry.name for entry in self.ledger.entries if entry.status in ("kept", "scales", "biases")]

    @property
    def partly_kept(self) -> list[str]:
        """Names of tensors of which only a part is exported verbatim."""
        return [name for name, placed in self.ledger.placed.items() if placed.rule.kept]


def describe_config(path: Path, max_length: int | None = None) -> Description:
    """Parse a config.json; `max_length` is the maximum sequence length, for RoPE scaling that depends on it.

    Raises SpecError or CheckpointError.
    """
    fields = Fields.read(path, max_length)
    family = family_of(fields)
    return Description(family, fields, family.spec_of(fields), family.tensors)


def with_learned_norms(spec: ModelSpec) -> ModelSpec:
    """Return the spec with every zero-centred norm replaced by a learned one."""

    def learned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: "learned" if inner == "zero_centred" else learned(inner) for key, inner in value.items()}
        return [learned(inner) for inner in value] if isinstance(value, list | tuple) else value

    return ModelSpec.model_validate(learned(spec.model_dump()))


def _without(spec: ModelSpec, part: str) -> ModelSpec:
    """Return the spec with null in every field of this name."""

    def dropped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: None if key == part else dropped(inner) for key, inner in value.items()}
        return [dropped(inner) for inner in value] if isinstance(value, list | tuple) else value

    return ModelSpec.model_validate(dropped(spec.model_dump()))


def make_layout(
    description: Description,
    path: Path,
    headers: Mapping[str, bytes],
    tensors: Mapping[str, StoredTensor],
    read: Callable[[str], Array],
    stored: frozenset[str] | None = None,
) -> Layout:
    """Build the layout and its ledger. Raises as `make_ledger`, and SpecError for an unsupported quantization."""
    codes = quantized_tensors(description.fields, tensors, _undeclared(description, path))
    description = description.in_layout({**tensors, **codes})
    plain = {name: Readable(tensor.dtype, tensor.shape, (name,)) for name, tensor in tensors.items()}
    forms = {name: (tensor.file, tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    ledger = make_ledger(description.family, description.rules, description.spec, plain | codes, forms, str(path))
    codes = {name: tensor for name, tensor in codes.items() if name in ledger.placed}
    stored = frozenset(tensors) if stored is None else stored
    return Layout(description, path, headers, tensors, codes, ledger, stored, read)


def _undeclared(description: Description, path: Path) -> Fields | None:
    """Return the quantization that config.json may leave out: of ModelOpt's own file, or of the family's files."""
    if not (path / MODELOPT).exists():
        values = description.family.undeclared
        return None if values is None else Fields(values, description.fields.where)
    file = Fields(read_json_object(inside(path, MODELOPT)), str(path / MODELOPT))
    inner = file.inside("quantization")
    if inner is None:
        raise file.refuse("quantization", "an object with quant_algo")
    return Fields({"quant_method": "modelopt"} | inner.raw, inner.where)


def small_files(path: Path) -> dict[str, Path]:
    """Return the non-tensor files to copy, by name: configs, tokenizer, chat templates (some in a subfolder).

    Raises CheckpointError for a link that leaves the folder: its target is not part of the checkpoint.
    """
    names = [file.name for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES and not file.name.startswith(".")]
    names = [name for name in names if name not in ADAPTERS]  # its tensors are not copied
    names += [f"{TEMPLATES}/{file.name}" for file in sorted((path / TEMPLATES).glob("*.jinja"))]
    found = {name: inside(path, name) for name in names if (path / name).is_file()}
    return {name: file for name, file in found.items() if file.stat().st_size <= MAX_SMALL_BYTES}


def copy_small_files(path: Path, folder: Path, without: Container[str]) -> None:
    """Copy the non-tensor files, except those named in `without`, to another folder. Raises as `small_files`."""
    for name, file in small_files(path).items():
        if name not in without:
            make_folder((folder / name).parent)
            copy_file(file, folder / name, MAX_SMALL_BYTES)


def write_sidecar(layout: Layout, folder: Path) -> None:
    """Write the layout of a run's original checkpoint to `folder` (`<run>/huggingface`)."""
    make_folder(folder)
    kept = [*layout.kept_names(), *layout.partly_kept, *_not_recoverable(layout)]
    header = encode_header({name: (layout.tensors[name].dtype, layout.tensors[name].shape) for name in kept}, {})
    write_stream(folder / _KEPT, header, ((name, layout.read(name)) for name in kept))
    copy_small_files(layout.path, folder, (HEADERS, _KEPT))
    headers = {name: header.decode("utf-8") for name, header in layout.headers.items()}
    write_atomically(folder / HEADERS, json.dumps(headers, indent=1, ensure_ascii=False) + "\n")


def open_sidecar(folder: Path) -> Layout | None:
    """Read the layout of a run's original checkpoint, or None. Raises CheckpointError if it is damaged."""
    if not (folder / HEADERS).exists():
        return None
    try:
        texts = parse_json(read_bounded(folder / HEADERS, _MAX_HEADERS_BYTES))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in texts):
            raise ValueError("not a base name of a safetensors file")
        headers = {name: text.encode("utf-8") for name, text in texts.items()}
        tensors = {
            name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]))
            for file, header in headers.items()
            for name, entry in entries_of(header)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / HEADERS} is damaged ({type(error).__name__}). Convert the checkpoint again."
        ) from None
    kept = SafetensorsFile(folder / _KEPT)
    description = describe_config(folder / CONFIG)
    return make_layout(description, folder, headers, tensors, kept.read, frozenset(kept.entries))


def _not_recoverable(layout: Layout) -> list[str]:
    """Return names of codes that cannot be recovered from their values and scales (packed, or with a scale of zero)."""
    found = []
    for tensor in layout.readable.values():
        if is_packed(tensor):
            found.append(tensor.stored[0])
            continue
        arrays = [layout.read(part) for part in tensor.stored]
        try:
            same = encode(tensor, decode(tensor, arrays), arrays[1:]).tobytes() == arrays[0].tobytes()
        except CheckpointError:
            same = False
        if not same:
            found.append(tensor.stored[0])
    return found


def entries_of(header: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return the entries of an already validated header, in order of offset."""
    entries = [(name, entry) for name, entry in json.loads(header).items() if name != "__metadata__"]
    return sorted(entries, key=lambda item: item[1]["data_offsets"])
