"""Families that may compute a given model: a cheap test that comes before the search."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.family import Family, families
from moezoo.core.huggingface.inverse.leaves import Leaves, Values, is_trained, leaves_of
from moezoo.core.huggingface.inverse.reads import Path, Read, RecordedFields, set_at
from moezoo.core.huggingface.inverse.rotations import rope_fields
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec, RoPESpec

# Families in whose form a model is written if several compute it: those that most other tools open come first, then
# those that mlx-lm has.
_FIRST = (
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "olmoe",
    "qwen2_moe",
    "gpt_oss",
    "glm4_moe",
    "granitemoe",
    "qwen3_next",
)
_START: dict[str, Any] = {"rope_parameters": rope_fields(RoPESpec())}  # a family may require them
_ROTATIONS = ("attention.position.scaling", "attention.position.fraction")
_LAYERS, _VOCAB = 7, 1 << 15
"""Sizes of the models by which a family is tried: enough layers for every kind that it has by default."""


@dataclass(frozen=True)
class Candidate:
    """A family, and why it cannot compute the model.

    `lacks`: parameters for which it has no tensor. `lacks_values`: paths whose value none of its models has.
    """

    family: Family
    lacks: tuple[str, ...]
    lacks_values: tuple[str, ...]

    @property
    def possible(self) -> bool:
        """True if nothing speaks against it."""
        return not self.lacks and not self.lacks_values


def candidates(spec: ModelSpec, wanted: Leaves) -> list[Candidate]:
    """Return all families, those that may compute the model first, in the order of preference.

    Values are compared where no parameter is lacking; if no family is possible, for all families, and those that lack
    the fewest values come first: one part that is missing may have twenty parameters.
    """
    parameters = {_pattern(row.name) for row in parameter_table(spec)}
    found = []
    for family in {family.name: family for family in families().values()}.values():
        lacks = tuple(sorted(parameters - _parameters(family)))
        found.append(Candidate(family, lacks, () if lacks else tuple(_unreachable(family, wanted))))
    if not any(each.possible for each in found):
        found = [replace(each, lacks_values=tuple(_unreachable(each.family, wanted))) for each in found]
    return sorted(
        found, key=lambda each: (not each.possible, len(each.lacks_values), len(each.lacks), _rank(each.family))
    )


def _rank(family: Family) -> tuple[int, bool, str]:
    first = _FIRST.index(family.name) if family.name in _FIRST else len(_FIRST)
    return first, not family.mlx, family.name


def _pattern(name: str) -> str:
    return re.sub(r"layers\.(\d+|\{\w+\})\.", "layers.*.", name)


@cache
def _parameters(family: Family) -> frozenset[str]:
    """Return the parameters that the family has tensors for, without indices of layers."""
    return frozenset(_pattern(part.ours) for rule in family.tensors for part in rule.parts)


@dataclass(frozen=True)
class _Tried:
    """A model of a family with few layers, as it was read: its fields, and the values that it has anywhere, by form."""

    reads: Mapping[Path, Read]
    forms: frozenset[tuple[str, Any]]

    @property
    def paths(self) -> frozenset[str]:
        """Paths at which it has a value."""
        return frozenset(path for path, _ in self.forms)


def _unreachable(family: Family, wanted: Leaves) -> list[str]:
    """Return the paths at which none of the family's models that are tried has a value like the wanted one.

    Each field is changed alone, at first from the defaults. A change that brings a wanted value is kept. If it brings
    a new part and nothing is missing but in new parts, every field is tried again: only there may it do something.
    """
    config: dict[str, Any] = {}
    model = _read(family, config)
    if model is None:
        return []
    missing = {each for each in _forms(wanted) if not _is_free(each[0])} - model.forms
    before, done = model.paths, set[tuple[Path, str]]()
    while missing and (changes := [each for each in _changes(model.reads) if (each[0], str(each[1])) not in done]):
        parts = model.paths
        for path, value in changes:
            done.add((path, str(value)))
            for changed, other in _changed(family, model, config, path, value):
                if not missing.isdisjoint(other.forms):
                    missing -= other.forms
                    config, model = (config, model) if changed is None else (changed, other)
        if not model.paths <= parts and before.isdisjoint(path for path, _ in missing):
            done.clear()
    return list(dict.fromkeys(path for path, _ in missing))


def _changed(
    family: Family, model: _Tried, config: dict[str, Any], path: Path, value: Any
) -> Iterator[tuple[dict[str, Any] | None, _Tried]]:
    """Yield the models with another value of a field, each with its config, or None if it is not one to keep.

    A list of layers that is refused is tried beside other lists, with all layers alike in one of them.
    """
    alone = set_at(config, path, value)
    if (other := _read(family, alone)) is not None:
        yield alone, other
    elif config and (other := _read(family, set_at({}, path, value))) is not None:
        yield None, other
    else:
        lists = [(name, read.options) for name, read in model.reads.items() if read.kind == "per layer"]
        lists = lists if any(name == path for name, _ in lists) else []
        for name, option in ((name, option) for name, options in lists if name != path for option in options):
            both = set_at(alone, name, [option] * _LAYERS)
            if (other := _read(family, both)) is not None:
                yield both, other


def _is_free(path: str) -> bool:
    """Return whether any family is taken to have any value: of what only training needs, and of rotations."""
    return is_trained(path) or path.startswith(_ROTATIONS)


def _forms(leaves: Leaves) -> frozenset[tuple[str, Any]]:
    """Return the values by path, each as what a search cannot change by a number: any number is like any other."""
    found = _forms_of(leaves.model)
    for values in {id(values): values for values in leaves.layers}.values():
        if id(values) not in _LAYER_FORMS:
            _LAYER_FORMS[id(values)] = (values, _forms_of(values))
        found |= _LAYER_FORMS[id(values)][1]
    return found


_LAYER_FORMS: dict[int, tuple[Values, frozenset[tuple[str, Any]]]] = {}  # a layer is held, so that none gets its id


def _forms_of(values: Values) -> frozenset[tuple[str, Any]]:
    return frozenset((path, _form(value)) for path, value in values.items())


def _form(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float
    return tuple if isinstance(value, tuple) else value


_READ: dict[tuple[str, str], _Tried | None] = {}  # a design after the other asks for the same models


def _read(family: Family, config: dict[str, Any]) -> _Tried | None:
    key = (family.name, json.dumps(config))
    if key not in _READ:
        _READ[key] = _read_anew(family, config)
    return _READ[key]


def _read_anew(family: Family, config: dict[str, Any]) -> _Tried | None:
    for start in ({}, _START):
        fields = RecordedFields(start | config, _LAYERS, _VOCAB)
        with suppress(SpecError):
            return _Tried(fields.reads, _forms(leaves_of(family.spec_of(fields))))
    return None


def _changes(reads: Mapping[Path, Read]) -> list[tuple[Path, Any]]:
    """Return other values of each field, first of those that may add parts, which may have options too."""
    ordered = sorted(reads.items(), key=lambda item: not _adds_parts(item[1]))
    return [(path, value) for path, read in ordered for value in _others(read)]


def _adds_parts(read: Read) -> bool:
    return read.kind in ("per layer", "layers") or not (read.options or read.default)


_MANY = 17  # more are no groups, shared experts or steps of a pattern


def _others(read: Read) -> list[Any]:
    """Return values of a field with which the model may have other parts."""
    match read.kind:
        case "option" | "json" if read.options:
            return [option for option in read.options if option != read.default]
        case "per layer":
            options = read.options or (0, 1)
            mixed = [options[index % len(options)] for index in range(_LAYERS)]
            return [mixed, *([option] * _LAYERS for option in options)]
        case "layers":
            return [[0], list(range(_LAYERS)), [1] * _LAYERS, []]
        case "whole":
            return [0 if read.default else 1]
        case "number":
            return [1.0] if not read.default else [2 * read.default] if 0 < read.default < 1e-3 else []
        case "positive":
            return [2 if read.default == 1 else 1] if (read.default or _MANY) < _MANY else []
        case "whole or null" | "json":
            return [2] if read.default is None else [None]
        case _:
            return []
