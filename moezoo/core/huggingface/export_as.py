"""Export of a model designed in moezoo as a checkpoint of a Hugging Face family with the same computation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moezoo.core.errors import SpecError
from moezoo.core.files import write_atomically
from moezoo.core.huggingface.export import into_new_folder, write_own_layout
from moezoo.core.huggingface.export_tokenizer import ExportedTokenizer
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.inverse.candidates import Candidate, candidates
from moezoo.core.huggingface.inverse.leaves import PRESENT, leaves_of
from moezoo.core.huggingface.inverse.solve import Solution, solve
from moezoo.core.huggingface.layout import CONFIG, Description
from moezoo.core.huggingface.ledger import first_rules, stored_dtype
from moezoo.core.huggingface.mlx_config import with_mlx_spellings
from moezoo.core.spec import LayerSpec, ModelSpec, PooledBalanceLossSpec, with_repeats

Array = npt.NDArray[Any]

_MOST_NEAREST = 2  # families that are searched for the nearest one if none computes a model
_MOST_NAMED = 4  # differences in an error


@dataclass(frozen=True)
class Exports:
    """Families whose files can have a model.

    Fields:
        families: names, the one that is written first.
        nearest: if there is none, the family that comes nearest, and the values in which it differs.
    """

    families: tuple[str, ...]
    nearest: Solution | None = None

    @property
    def obstacles(self) -> str:
        """The values that stand in the way of the nearest family, in the words of the config; empty if none do."""
        return "" if self.nearest is None else _obstacles(self.nearest)

    @property
    def words(self) -> str:
        """Both in one line."""
        if self.nearest is not None:
            return f"no Hugging Face family computes this model; the nearest is {self.obstacles}"
        first, *others = self.families
        return f"as {first}" + (f" (or {', '.join(others)}, which compute the same)" if others else "")

    def to_json(self) -> dict[str, Any]:
        """Return the names, and of the nearest family the differences, as plain data."""
        if self.nearest is None:
            return {"families": list(self.families)}
        differences = [each._asdict() for each in self.nearest.differences]
        return {"families": [], "nearest": {"family": self.nearest.family.name, "differences": differences}}


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
    if family.equivalent is not None:
        parameters = {**parameters, **family.equivalent(parameters)}

    def write(folder: Path) -> list[str]:
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.write(folder)
        placed = first_rules(family.tensors, spec)
        forms = {name: (stored_dtype(rule, "F32"), rule.shape) for name, rule in placed.items()}
        write_own_layout(parameters, placed, forms, {}, folder)
        return [f"written as {family.name}, which computes the same function"]

    return into_new_folder(out, write)


def family_for(spec: ModelSpec, max_length: int) -> tuple[Family, dict[str, Any]]:
    """Return the first family that parses the same model back, and its config.json. Raises as `export_as_family`."""
    wanted = _comparable(spec)
    ranked = candidates(wanted, leaves_of(wanted))
    for candidate in ranked:
        solution = solve(candidate.family, wanted, {}) if candidate.possible else None
        if solution is not None and solution.exact:
            return candidate.family, _whole_config(solution, spec, max_length)
    raise SpecError(
        f"no Hugging Face family computes this model. The nearest is {_obstacles(_nearest(wanted, ranked))}. Save "
        "it with format='moezoo', or change the model to fit this family."
    )


def exports(spec: ModelSpec) -> Exports:
    """Return the families that compute a model, or else what stands in the way of the nearest."""
    wanted = _comparable(spec)
    ranked = candidates(wanted, leaves_of(wanted))
    solutions = [solve(candidate.family, wanted, {}) for candidate in ranked if candidate.possible]
    names = tuple(solution.family.name for solution in solutions if solution.exact)
    return Exports(names) if names else Exports((), _nearest(wanted, ranked))


def describe_as_family(spec: ModelSpec, max_length: int, where: str) -> Description:
    """Return the description of the model as `family_for` writes it. `where`: for errors. Raises as `family_for`."""
    family, config = family_for(spec, max_length)
    fields = Fields(config, f"{where} as {family.name}")
    return Description(family, fields, family.spec_of(fields), family.tensors)


def _comparable(spec: ModelSpec) -> ModelSpec:
    """Return the spec without losses that no family has, and with equal layers in one entry."""

    def with_their_losses(layer: LayerSpec) -> LayerSpec:
        if layer.moe is None:
            return layer
        losses = tuple(loss for loss in layer.moe.losses if isinstance(loss, PooledBalanceLossSpec))
        return layer.model_copy(update={"moe": layer.moe.model_copy(update={"losses": losses})})

    layers = with_repeats([with_their_losses(layer) for layer in spec.layers])
    return spec.model_copy(update={"layers": layers, "adapter": None})


def _nearest(wanted: ModelSpec, ranked: Sequence[Candidate]) -> Solution:
    """Return the nearest solution, of the families that may compute the model and of those that lack the least."""
    possible = sum(each.possible for each in ranked)
    tried = [solve(each.family, wanted, {}) for each in ranked[: possible + _MOST_NEAREST]]
    return min(tried, key=lambda solution: solution.distance)


def _obstacles(solution: Solution) -> str:
    """Return the family's name and the values in which it differs."""
    if solution.problem is not None:
        return f"{solution.family.name} ({solution.problem})"
    named = [f"{each.path} {_shown(each.there)}, not {_shown(each.here)}" for each in solution.differences]
    more = f" and {len(named) - _MOST_NAMED} more" if named[_MOST_NAMED:] else ""
    return f"{solution.family.name}, which has {'; '.join(named[:_MOST_NAMED])}{more}"


def _shown(value: Any) -> str:
    return "set" if value == PRESENT else f"{json.dumps(value, default=str):.60}"


def _whole_config(solution: Solution, spec: ModelSpec, max_length: int) -> dict[str, Any]:
    """Return the config.json: the fields that the family reads, and those that others read."""
    family = solution.family
    found = {"architectures": [family.causal_class], "model_type": family.name, "dtype": "float32", **solution.config}
    for name in ("max_position_embeddings", "max_seq_len"):
        if name in family.harmless:
            found.setdefault(name, max_length)
    return with_mlx_spellings(family, Fields(found, f"as {family.name}"), spec)
