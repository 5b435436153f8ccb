"""A model that was designed here, as a checkpoint of a family that computes the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moezoo.core.errors import MoezooError, SpecError
from moezoo.core.files import write_atomically
from moezoo.core.huggingface.export import into_new_folder, write_own_layout
from moezoo.core.huggingface.family import Family, families
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.layout import CONFIG
from moezoo.core.huggingface.ledger import first_rules
from moezoo.core.huggingface.parts import grouped
from moezoo.core.spec import ModelSpec

Array = npt.NDArray[Any]

# What only training knows of, by the last names of its path: files of a family do not say it.
_TRAINING_ONLY = ("losses", "jitter", "rate", "dispatch", "loss_coefficient", "dropout", "initializer", "precision")


def export_as_family(
    parameters: Mapping[str, Array], spec: ModelSpec, out: Path, *, max_length: int, tokenizer: Path | None = None
) -> list[str]:
    """Write a folder of the first family whose own file reads the same model back from its config.json.

    Args:
        parameters: by canonical name; stored as float32.
        spec: the model.
        out: a new or empty folder.
        max_length: `max_position_embeddings`, which changes no number.
        tokenizer: a folder of tokenizer files to copy.

    Returns a note that names the family. Raises SpecError: no family computes this; what differs is named. Raises
    RunError: the folder exists and is not empty.
    """
    family, config = family_for(spec, max_length)

    def write(folder: Path) -> list[str]:
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        for file in sorted(tokenizer.iterdir()) if tokenizer is not None else ():
            if file.is_file():
                write_atomically(folder / file.name, file.read_bytes())
        placed = first_rules(family, spec)
        forms = {name: ("F32", rule.shape) for name, rule in placed.items()}
        write_own_layout(parameters, placed, forms, {}, folder)
        return [f"written as {family.name}, which computes the same"]

    return into_new_folder(out, write)


def family_for(spec: ModelSpec, max_length: int) -> tuple[Family, dict[str, Any]]:
    """The first family whose own file reads the same model back, and its config.json. Raises as `export_as_family`."""
    nearest: list[str] = []
    for family in {family.name: family for family in families().values()}.values():
        config = None if family.config is None else family.config(spec)
        if config is None:
            continue
        config |= {"model_type": family.name, "max_position_embeddings": max_length, "dtype": "float32"}
        config |= {"vocab_size": spec.vocab, "hidden_size": spec.embed_dim, "num_hidden_layers": len(spec.all_layers)}
        try:
            read = family.spec_of(Fields(config, f"as {family.name}"))
        except MoezooError as error:
            nearest.append(f"{family.name} ({error})")
            continue
        difference = _difference(_mathematics(read), _mathematics(spec))
        if difference is None:
            return family, config
        nearest.append(f"{family.name} has {difference}")
    why = f": {'; '.join(nearest)}" if nearest else ""
    raise SpecError(
        f"no Hugging Face family that moezoo writes computes this model{why}. "
        "Save it with format='moezoo', or design it within one of these families."
    )


def _mathematics(spec: ModelSpec) -> Any:
    """What inference computes, as plain values."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items() if key not in _TRAINING_ONLY}
        return [kept(inner) for inner in value] if isinstance(value, list | tuple) else value

    return kept(spec.model_copy(update={"layers": grouped(spec.all_layers)}).model_dump())


def _difference(read: Any, given: Any, path: str = "") -> str | None:
    """The first place where two trees of plain values differ."""
    if isinstance(read, dict) and isinstance(given, dict) and read.keys() == given.keys():
        pairs = [(f"{path}.{key}" if path else key, read[key], given[key]) for key in read]
    elif isinstance(read, list) and isinstance(given, list) and len(read) == len(given):
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(read, given, strict=True))]
    else:
        return None if read == given else f"{path} {read!s:.60}, not {given!s:.60}"
    return next((found for name, left, right in pairs if (found := _difference(left, right, name))), None)
