"""Export of a model designed in moezoo as a checkpoint of a Hugging Face family with the same computation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moezoo.core.errors import MoezooError, SpecError
from moezoo.core.files import write_atomically
from moezoo.core.huggingface.export import into_new_folder, write_own_layout
from moezoo.core.huggingface.export_tokenizer import ExportedTokenizer
from moezoo.core.huggingface.family import Family, families
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.layout import CONFIG, Description
from moezoo.core.huggingface.ledger import first_rules
from moezoo.core.spec import ModelSpec, with_repeats

Array = npt.NDArray[Any]

# Spec fields that only affect training, by field name: checkpoints of a family do not contain them.
_TRAINING_ONLY = ("losses", "jitter", "rate", "dispatch", "loss_coefficient", "dropout", "initializer", "precision")


def export_as_family(
    parameters: Mapping[str, Array],
    spec: ModelSpec,
    out: Path,
    *,
    max_length: int,
    tokenizer: ExportedTokenizer | None = None,
) -> list[str]:
    """Write a checkpoint of the first family that parses the same model back from its config.json.

    Args:
        parameters: arrays by canonical name; stored as float32.
        spec: the model.
        out: a new or empty folder.
        max_length: value of `max_position_embeddings`, which does not affect the computation.
        tokenizer: written with the weights; None: the folder gets no tokenizer.

    Returns a note that names the family. Raises SpecError if no family computes this model; the error lists the
    differences. Raises RunError if the folder exists and is not empty.
    """
    family, config = family_for(spec, max_length)

    def write(folder: Path) -> list[str]:
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.write(folder)
        placed = first_rules(family.tensors, spec)
        forms = {name: ("F32", rule.shape) for name, rule in placed.items()}
        write_own_layout(parameters, placed, forms, {}, folder)
        return [f"written as {family.name}, which computes the same function"]

    return into_new_folder(out, write)


def family_for(spec: ModelSpec, max_length: int) -> tuple[Family, dict[str, Any]]:
    """Return the first family that parses the same model back, and its config.json. Raises as `export_as_family`."""
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
        difference = _difference(_inference_fields(read), _inference_fields(spec))
        if difference is None:
            return family, config
        nearest.append(f"{family.name} has {difference}")
    why = f": {'; '.join(nearest)}" if nearest else ""
    raise SpecError(
        f"no Hugging Face family that moezoo can export computes this model{why}. "
        "Save it with format='moezoo', or change the model to fit one of these families."
    )


def describe_as_family(spec: ModelSpec, max_length: int, where: str) -> Description:
    """Return the description of the model as `family_for` writes it. `where`: for errors. Raises as `family_for`."""
    family, config = family_for(spec, max_length)
    fields = Fields(config, f"{where} as {family.name}")
    return Description(family, fields, family.spec_of(fields), family.tensors)


def _inference_fields(spec: ModelSpec) -> Any:
    """Return the spec as plain values, without the fields that only affect training."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items() if key not in _TRAINING_ONLY}
        return [kept(inner) for inner in value] if isinstance(value, list | tuple) else value

    return kept(spec.model_copy(update={"layers": with_repeats(spec.layers)}).model_dump())


def _difference(read: Any, expected: Any, path: str = "") -> str | None:
    """Return the first difference between two trees of plain values, or None."""
    if isinstance(read, dict) and isinstance(expected, dict) and read.keys() == expected.keys():
        pairs = [(f"{path}.{key}" if path else key, read[key], expected[key]) for key in read]
    elif isinstance(read, list) and isinstance(expected, list) and len(read) == len(expected):
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(read, expected, strict=True))]
    else:
        return None if read == expected else f"{path} {read!s:.60}, not {expected!s:.60}"
    return next((found for name, left, right in pairs if (found := _difference(left, right, name))), None)
