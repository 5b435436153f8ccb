"""Export of weights in mlx-lm's layout, in floats or quantized, or back to transformers' layout in floats.

Names and transforms are rules of the family; codes are those of `mx.quantize` for the matrix of each module. One
parameter is in memory at a time, with its codes and a piece of a few MiB.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import LazyTensors, shapes_of, write_stream
from moezoo.core.checkpoint.safetensors_header import encode_header, size_bytes
from moezoo.core.errors import SpecError
from moezoo.core.files import write_atomically
from moezoo.core.huggingface.export import INDEX, assembled_pieces, shards_of, write_index, write_small_files
from moezoo.core.huggingface.export_tokenizer import ExportedTokenizer
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields, text_config
from moezoo.core.huggingface.layout import CONFIG, MODELOPT, Description, with_learned_norms
from moezoo.core.huggingface.ledger import first_rules, stored_dtype
from moezoo.core.huggingface.mlx_config import (
    QUANTIZATION,
    lacks_wrapper,
    mlx_lm_has,
    with_mlx_spellings,
    without_quantization,
)
from moezoo.core.huggingface.quantized_tensors import numpy_dtype
from moezoo.core.huggingface.recipe import Recipe
from moezoo.core.huggingface.tensors import Placed
from moezoo.core.parameters import parameter_table
from moezoo.core.progress import Progress
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.quantize import quantize
from moezoo.core.spec import ModelSpec

Array = npt.NDArray[Any]
Form = tuple[str, tuple[int, ...]]  # dtype and shape of a stored tensor
LayoutName = Literal["mlx", "transformers"]

_WEIGHT, _SCALES, _BIASES = ".weight", ".scales", ".biases"


@dataclass(frozen=True)
class Target:
    """A checkpoint to write: its config, and the tensors by name with the rule and the dtype of each.

    Fields:
        layout: names and transforms.
        config: content of config.json.
        spec: the model; in mlx-lm's layout most norms that are zero-centred elsewhere have their scale plus one.
        placed: the rule of each tensor.
        dtypes: of floats, scales and biases, by tensor.
        formats: of the tensors that are quantized.
        undivided: modules that stay in floats because their last axis does not divide.
    """

    layout: LayoutName
    config: dict[str, Any]
    spec: ModelSpec
    placed: Mapping[str, Placed]
    dtypes: Mapping[str, str]
    formats: Mapping[str, QuantizationFormat]
    undivided: tuple[str, ...]

    def forms(self, name: str) -> dict[str, Form]:
        """Return dtype and shape of the stored tensors of one tensor: of codes, scales and biases if quantized."""
        shape, format = self.placed[name].shape, self.formats.get(name)
        if format is None:
            return {name: (self.dtypes[name], shape)}
        module, groups = name.removesuffix(_WEIGHT), (*shape[:-1], format.groups(shape[-1]))
        found = {name: ("U32", (*shape[:-1], format.words(shape[-1])))}
        found[module + _SCALES] = (self.dtypes[name] if format.has_biases else "U8", groups)
        return found | ({module + _BIASES: (self.dtypes[name], groups)} if format.has_biases else {})


def make_target(
    description: Description, dtypes: Mapping[str, str], layout: LayoutName, recipe: Recipe | None
) -> Target:
    """Plan a checkpoint in a layout.

    Args:
        description: the model as it was read, in either layout.
        dtypes: safetensors dtype of each parameter's floats.
        layout: to write.
        recipe: formats of modules; None: all in floats.

    Raises SpecError: mlx-lm does not have the family, or its config would mean another model.
    """
    family, fields = description.family, description.fields
    if description.lacks is not None:
        raise SpecError(
            f"the files of {fields.where} lack {description.lacks}, which mlx-lm drops, so config.json would describe "
            "another model than they have. Convert the checkpoint in transformers' layout."
        )
    config = _mlx_config(family, fields, description.spec) if layout == "mlx" else _text_config(fields)
    read = Fields(config, f"{fields.where} in the layout of {layout}", fields.max_length)
    spec = family.spec_of(read)
    if layout == "mlx" and not family.mlx_lm.zero_centred:
        spec = with_learned_norms(spec)
    _check_same(spec, description.spec, layout)
    rules = family.mlx_tensors if layout == "mlx" else family.tensors
    prefix = "language_model." if layout == "mlx" and "text_config" in config else ""
    placed = {prefix + name: rule for name, rule in first_rules(rules, spec).items()}
    stored = {
        name: stored_dtype(rule, "F32" if len({dtypes[ours] for ours in rule.ours}) > 1 else dtypes[rule.ours[0]])
        for name, rule in placed.items()
    }
    if recipe is None:
        return Target(layout, config, spec, placed, stored, {}, ())
    formats, undivided = _formats(recipe, family, spec, placed, prefix)
    outer = recipe.format
    declared: dict[str, Any] = _plain(outer)
    declared |= {
        name.removesuffix(_WEIGHT): _plain(format) for name, format in sorted(formats.items()) if format != outer
    }
    config |= dict.fromkeys(QUANTIZATION, declared)
    return Target(layout, config, spec, placed, stored, formats, undivided)


def write_target(
    target: Target,
    parameters: Mapping[str, Array],
    source: ModelSpec,
    folder: Path,
    *,
    files: Path | None = None,
    tokenizer: ExportedTokenizer | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Write a planned checkpoint into a folder.

    Args:
        target: the plan.
        parameters: floats by canonical name, read one at a time.
        source: spec of `parameters`; scales of norms are moved by one where it and the target differ.
        folder: an existing folder.
        files: folder of the source's small files, which are copied; None if there are none.
        tokenizer: replaces that of `files`.
        on_progress: progress callback, in tensors.
    """
    if files is not None:
        write_small_files(files, folder, tokenizer, {CONFIG, INDEX, MODELOPT})
    write_atomically(folder / CONFIG, json.dumps(target.config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.write(folder)
    moved = _Moved(parameters, _offsets(source, target.spec))
    done = 0

    def stream(names: list[str]) -> Iterator[tuple[str, Array]]:
        nonlocal done
        for name in sorted(names, key=lambda name: target.placed[name].ours):  # one tensor per expert: read once
            moved.hold(target.placed[name].ours)
            yield from _arrays(name, target, moved)
            done += 1
            if on_progress is not None:
                on_progress("quantizing" if target.formats else "writing", done, len(target.placed))

    forms = {name: target.forms(name) for name in target.placed}
    shards = shards_of({name: sum(size_bytes(*form) for form in parts.values()) for name, parts in forms.items()})
    metadata = {"format": "mlx" if target.layout == "mlx" else "pt"}
    for file_name, names in shards.items():
        stored = {part: form for name in names for part, form in forms[name].items()}
        write_stream(folder / file_name, encode_header(dict(sorted(stored.items())), metadata), stream(names))
    every = {
        part: (file_name, form)
        for file_name, names in shards.items()
        for name in names
        for part, form in forms[name].items()
    }
    if len(shards) > 1 or target.layout == "mlx":
        numbers = sum(row.size for row in parameter_table(target.spec))
        write_index(folder, every, {"total_parameters": numbers} if target.layout == "mlx" else {})


def _arrays(name: str, target: Target, parameters: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Yield the stored tensors of one tensor, assembled and quantized in pieces."""
    placed, dtype, format = target.placed[name], numpy_dtype(target.dtypes[name]), target.formats.get(name)
    pieces = assembled_pieces(name, placed, parameters, dtype)
    if format is None:
        whole = np.empty(placed.shape, dtype)
        for rows, piece in pieces:
            whole[rows] = piece
        yield name, whole
        return
    shape, module = placed.shape, name.removesuffix(_WEIGHT)
    codes = np.empty((*shape[:-1], format.words(shape[-1])), np.uint32)
    scales = np.empty((*shape[:-1], format.groups(shape[-1])), dtype if format.has_biases else np.uint8)
    biases = np.empty_like(scales) if format.has_biases else None
    for rows, piece in pieces:
        codes[rows], scales[rows], found = quantize(piece, format)
        if biases is not None and found is not None:
            biases[rows] = found
    yield name, codes
    yield module + _SCALES, scales
    if biases is not None:
        yield module + _BIASES, biases


def _formats(
    recipe: Recipe, family: Family, spec: ModelSpec, placed: Mapping[str, Placed], prefix: str
) -> tuple[dict[str, QuantizationFormat], tuple[str, ...]]:
    """Return the format of every tensor that is quantized, and the modules whose rows do not divide."""
    roles = {row.name: role_of(row.name, row.role) for row in parameter_table(spec)}
    found: dict[str, QuantizationFormat] = {}
    undivided = []
    for name, rule in placed.items():
        module, ours = name.removesuffix(_WEIGHT), rule.ours[0]
        if not is_matrix(name, rule) or any(fnmatchcase(module, pattern) for pattern in family.mlx_lm.floats):
            continue
        layer = int(ours.split(".")[1]) if ours.startswith("layers.") else None
        format = recipe.format_of(
            module.removeprefix(prefix), roles[ours], layer, len(spec.all_layers), family.mlx_lm.eight_bits
        )
        if format is None:
            continue
        if format.divides(rule.shape[-1]):
            found[name] = format
        else:
            undivided.append(module)
    return found, tuple(undivided)


def is_matrix(name: str, placed: Placed) -> bool:
    """Return True for the matrix of a linear layer, of stacked experts or of an embedding; convolutions are none."""
    is_convolution = any(ours.rpartition(".")[2].startswith("conv") for ours in placed.ours)
    return name.endswith(_WEIGHT) and len(placed.shape) > 1 and not is_convolution


def role_of(name: str, role: str) -> str:
    """Return a parameter's role in recipes: those of the parameter table, but the head and a gate of shared experts
    have roles of their own: head, router."""
    if name.startswith("head."):
        return "head"
    return "router" if name.endswith(".w_shared_gate") else role


def _plain(format: QuantizationFormat) -> dict[str, Any]:
    return {"group_size": format.group_size, "bits": format.bits, "mode": format.mode}


def _mlx_config(family: Family, fields: Fields, spec: ModelSpec) -> dict[str, Any]:
    """Return a config.json with the spellings that mlx-lm reads, in the wrapper that it needs, or without one."""
    if lacks_wrapper(family, fields):
        fields = Fields(_text_config(fields) | {"model_type": family.name}, fields.where, fields.max_length)
    if not mlx_lm_has(family, fields):
        raise SpecError(
            f"mlx-lm 0.32 does not have model_type {fields.model_type} ({fields.where}). Use --layout transformers."
        )
    if (reason := family.mlx_lm.refuses(spec)) is not None:
        raise SpecError(f"mlx-lm 0.32 cannot compute this model: {reason} ({fields.where}). Use --layout transformers.")
    config = without_quantization(with_mlx_spellings(family, fields, spec))
    if family.mlx_lm.wrapper is None or "text_config" in config:
        return config
    return {"model_type": family.mlx_lm.wrapper, "vocab_size": spec.vocab, "text_config": config}


def _text_config(fields: Fields) -> dict[str, Any]:
    """Return the config.json of the text model alone, without quantization."""
    inner = text_config(fields.raw)
    return without_quantization(inner if inner is fields.raw else {"model_type": fields.model_type} | inner)


def _check_same(spec: ModelSpec, source: ModelSpec, layout: str) -> None:
    if with_learned_norms(spec) != with_learned_norms(source):
        raise SpecError(
            f"config.json in the spelling of {layout} would describe another model. Please report the model's "
            "config.json as a bug of moezoo."
        )


def _offsets(source: ModelSpec, target: ModelSpec) -> dict[str, float]:
    """Return what is added to the scale of each norm that is zero-centred in one of the specs only."""
    before = {row.name: row for row in parameter_table(source)}
    return {
        row.name: row.initializer.value - before[row.name].initializer.value
        for row in parameter_table(target)
        if row.role == "norms" and row.initializer != before[row.name].initializer
    }


class _Moved(LazyTensors):
    """Parameters, with numbers added to some of them in float64 and rounded once; those on `hold` are read once."""

    def __init__(self, inner: Mapping[str, Array], offsets: Mapping[str, float]):
        super().__init__(shapes_of(inner))
        self._inner, self._offsets = inner, offsets
        self._held: dict[str, Array] = {}

    def hold(self, names: tuple[str, ...]) -> None:
        """Keep only these parameters in memory, once they are read."""
        self._held = {name: value for name, value in self._held.items() if name in names}

    def __getitem__(self, name: str) -> Array:
        if name not in self._held:
            value = self._inner[name]
            if name in self._offsets:
                value = (value.astype(np.float64) + self._offsets[name]).astype(value.dtype)
            self._held[name] = value
        return self._held[name]


def storage_note(target: Target) -> str:
    """Return the bits per weight of a planned checkpoint, of all and by role."""
    roles = {row.name: role_of(row.name, row.role) for row in parameter_table(target.spec)}
    bits: dict[str, int] = {}
    numbers: dict[str, int] = {}
    for name, rule in target.placed.items():
        role = roles[rule.ours[0]]
        bits[role] = bits.get(role, 0) + 8 * sum(size_bytes(*form) for form in target.forms(name).values())
        numbers[role] = numbers.get(role, 0) + math.prod(rule.shape)
    parts = ", ".join(f"{role} {bits[role] / numbers[role]:.3g}" for role in numbers if role != "norms")
    return f"{sum(bits.values()) / sum(numbers.values()):.4g} bits per weight: {parts}"


def low_router_note(target: Target) -> list[str]:
    """Return a line if routers have codes of fewer than 8 bits, which change the chosen experts."""
    routers = {row.name for row in parameter_table(target.spec) if row.role == "router"}
    bits = [format.bits for name, format in target.formats.items() if routers & {*target.placed[name].ours}]
    if not bits or min(bits) >= 8:
        return []
    return [f"the router has {min(bits)} bits: other experts are chosen. Use --router 8bit, which costs almost nothing"]
