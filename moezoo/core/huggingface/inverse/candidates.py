"""Families that may compute a given model: a cheap test that comes before the search."""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
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
_ROTATIONS = ("attention.position",)
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
    """Return all families, those that may compute the model first, in the order of preference."""
    parameters = {_pattern(row.name) for row in parameter_table(spec)}
    found = []
    for family in {family.name: family for family in families().values()}.values():
        lacks = tuple(sorted(parameters - _parameters(family)))
        found.append(Candidate(family, lacks, () if lacks else tuple(_unreachable(family, wanted))))
    return sorted(
        found, key=lambda each: (bool(each.lacks), len(each.lacks) + len(each.lacks_values), _rank(each.family))
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


def _unreachable(family: Family, wanted: Leaves) -> Iterable[str]:
    """Yield the paths at which no model of the family has a value like the wanted one."""
    reached = _reached(family)
    for values in (wanted.model, *{id(values): values for values in wanted.layers}.values()):
        for path, value in values.items():
            free = is_trained(path) or path.startswith(_ROTATIONS) or not reached
            if not free and _form(value) not in reached.get(path, ()):
                yield path


def _form(value: Any) -> Any:
    """Return what a search cannot change by a number: any number is like any other."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float
    return tuple if isinstance(value, tuple) else value


@cache
def _reached(family: Family) -> dict[str, set[Any]]:
    """Return the forms of the values that the family's models have, each field changed alone."""
    found: dict[str, set[Any]] = {}
    base = _read(family, {})
    if base is None:
        return {}
    seen: dict[int, Values] = {}
    _add(found, base[1], seen)
    config: dict[str, Any] = {}
    for adding in (True, False):  # first parts that are not there by default, which may have options too
        for path, read in list(base[0].reads.items()):
            for value in _others(read) if _adds_parts(read) == adding else ():
                other = _read(family, set_at(config, path, value))
                if other is None and config:
                    other = _read(family, set_at({}, path, value))
                if other is not None and _add(found, other[1], seen) and adding:
                    config, base = set_at(config, path, value), other
                if other is None and read.kind == "per layer":
                    for another in _with_room(family, base[0], set_at(config, path, value), path):
                        _add(found, another, seen)
    return found


def _with_room(family: Family, base: RecordedFields, config: dict[str, Any], path: Path) -> Iterable[Leaves]:
    """Yield the models with this list of layers, refused by itself, and with all layers alike in another list."""
    for other, read in base.reads.items():
        for option in read.options if read.kind == "per layer" and other != path else ():
            model = _read(family, set_at(config, other, [option] * _LAYERS))
            if model is not None:
                yield model[1]


def _read(family: Family, config: dict[str, Any]) -> tuple[RecordedFields, Leaves] | None:
    for start in ({}, _START):
        fields = RecordedFields(start | config, _LAYERS, _VOCAB)
        with suppress(SpecError):
            return fields, leaves_of(family.spec_of(fields))
    return None


def _adds_parts(read: Read) -> bool:
    return read.kind in ("per layer", "layers") or not (read.options or read.default)


def _add(found: dict[str, set[Any]], leaves: Leaves, seen: dict[int, Values]) -> bool:
    """Add the forms of a model's values, and return whether there are new ones. `seen`: layers that were added."""
    more = False
    for values in (leaves.model, *{id(values): values for values in leaves.layers}.values()):
        if id(values) in seen:
            continue
        seen[id(values)] = values  # held, so that no other layer gets its id
        for path, value in values.items():
            forms, form = found.setdefault(path, set()), _form(value)
            if form not in forms:
                forms.add(form)
                more = True
    return more


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
