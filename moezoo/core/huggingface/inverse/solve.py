"""Search for the fields of a config.json from which a family reads a given ModelSpec.

It starts at the family's defaults. Each field is changed alone to see which values of the spec follow from it and how:
the same number, a multiple, a share. Then every field is set to what the wanted spec asks for, first all at once, since
half of a model is often impossible, then one by one as long as that brings the spec nearer. What is left is the part of
the model that the family cannot express.
"""

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.inverse.leaves import (
    Difference,
    Distance,
    Leaves,
    changed,
    differences,
    distance,
    layer_distances,
    leaves_of,
)
from moezoo.core.huggingface.inverse.maps import Inverse, edges_of, inverse_of, is_number, probes, same, unknown
from moezoo.core.huggingface.inverse.reads import ABSENT, Path, Read, RecordedFields, get_at, set_at
from moezoo.core.huggingface.inverse.rotations import positions_of, rope_fields
from moezoo.core.spec import ModelSpec

_ROUNDS = 6
_MOST_CANDIDATES = 16
_IMPOSSIBLE = Distance(1 << 60, 0)
Links = dict[Path, dict[str, Inverse]]
"""Inverses by field, and by the path of the value in the spec."""

_ROPE: Path = ("rope_parameters",)


@dataclass(frozen=True)
class Solution:
    """The config of a family whose model is nearest to a given one, and the values in which it differs.

    `config`: without `model_type` and what never affects the computation. `problem`: why no model could be read.
    """

    family: Family
    config: dict[str, Any]
    differences: list[Difference]
    problem: str | None = None
    distance: Distance = _IMPOSSIBLE

    @property
    def exact(self) -> bool:
        """True if the family computes the model."""
        return self.problem is None and not self.differences


def solve(family: Family, wanted: ModelSpec, start: Mapping[str, Any]) -> Solution:
    """Return the nearest config of a family. `start`: fields that are known."""
    own = {} if family.config is None else family.config(wanted)
    shapes = [own.pop(_ROPE[0])] if _ROPE[0] in own else []
    search = _Search(family, wanted, {**start, **own}, shapes)
    best = search.run()
    if best.leaves is None:
        return Solution(family, best.config, [], best.problem)
    return Solution(family, search.complete(best), differences(best.leaves, search.wanted), distance=best.cost)


@dataclass(frozen=True)
class _Outcome:
    """A config, what the family read from it, and how far its model is from the wanted one."""

    config: dict[str, Any]
    leaves: Leaves | None
    cost: Distance
    fields: RecordedFields
    problem: str | None = None

    @property
    def reads(self) -> dict[Path, Read]:
        return self.fields.reads

    def value(self, path: Path) -> Any:
        """The value of a field: in the config, or the default."""
        found = get_at(self.config, path, ABSENT)
        if found is None and self.reads[path].kind == "whole or null":
            return None
        return self.reads[path].default if found is ABSENT or found is None else found


@dataclass
class _Search:
    family: Family
    spec: ModelSpec
    start: dict[str, Any]
    shapes: list[dict[str, Any]]  # of rope_parameters, that the family states itself
    wanted: Leaves = field(init=False)
    partners: dict[Path, Path] = field(default_factory=dict)
    known: dict[str, _Outcome] = field(default_factory=dict)  # by config: rounds try many of them again

    def __post_init__(self) -> None:
        self.wanted = leaves_of(self.spec)
        self.number = len(self.wanted.layers)
        self.edges = edges_of(self.wanted)

    # --- reading a config ------------------------------------------------------------------------------------------

    def read(self, config: dict[str, Any]) -> _Outcome:
        key = json.dumps(config)
        if key not in self.known:
            self.known[key] = self.read_anew(config)
        return self.known[key]

    def read_anew(self, config: dict[str, Any]) -> _Outcome:
        fields = RecordedFields(config, self.number, self.spec.vocab)
        try:
            leaves = leaves_of(self.family.spec_of(fields))
        except SpecError as error:
            return _Outcome(config, None, _IMPOSSIBLE, fields, str(error))
        for path, value in fields.started.items():
            config = set_at(config, path, value)
        return _Outcome(config, leaves, distance(leaves, self.wanted), fields)

    def better(self, best: _Outcome, configs: Iterable[dict[str, Any]]) -> _Outcome:
        """Return the best of these configs, or `best` if none is nearer."""
        for config in configs:
            found = self.read(config)
            if found.cost < best.cost:
                best = found
        return best

    # --- the search ------------------------------------------------------------------------------------------------

    def run(self) -> _Outcome:
        best = self.read(self.start)
        if best.leaves is None:
            shapes = [rope_fields(position) for position in positions_of(self.spec.layers)]
            best = self.better(best, [set_at(self.start, _ROPE, shape) for shape in shapes])
        links: Links = {}
        for _ in range(_ROUNDS):
            before = best.cost
            if best.leaves is None:
                break
            best = self.structure(best)
            links = self.links(best, links)
            best = self.better(best, self.jumps(best, links))
            for path in list(best.reads):
                if path in best.reads and best.cost > (0, 0):
                    best = self.better(best, self.numbers(best, path, links.get(path, {})))
            if best.cost == before or best.cost.computed == 0:
                break
        return best

    def structure(self, best: _Outcome) -> _Outcome:
        """Set lists of layers and options, each alone, then rotations."""
        before = self.lists(best)
        best = before
        for path, read in list(before.reads.items()):
            if read.options and read.kind != "per layer" and path in best.reads:
                options = [option for option in read.options if option != best.value(path)]
                best = self.better(best, [set_at(best.config, path, option) for option in options])
        if best is not before:
            best = self.lists(best)
        return self.rope(best) if _ROPE in best.reads else best

    def lists(self, best: _Outcome) -> _Outcome:
        """Set each list of layers."""
        for path, read in list(best.reads.items()):
            if read.kind == "per layer" and path in best.reads:
                best = self.per_layer(best, path, read.options or self.likely(best, path))
            elif read.kind == "layers" and path in best.reads:
                best = self.better(best, self.listed(best, path))
        return best

    def per_layer(self, best: _Outcome, path: Path, options: Iterable[Any]) -> _Outcome:
        """Set each layer of a list to the option with which it is nearest."""
        costs, refused = {}, []
        for option in dict.fromkeys(options):
            found = self.read(set_at(best.config, path, [option] * self.number))
            if found.leaves is not None and len(found.leaves.layers) == self.number:
                costs[option] = layer_distances(found.leaves, self.wanted)
            else:
                refused.append(option)
        if costs:
            chosen = [min(costs, key=lambda option: costs[option][index]) for index in range(self.number)]
            best = self.better(best, [set_at(best.config, path, chosen)])
        for option in refused:  # not possible in every layer
            for index in range(self.number):
                kinds = best.value(path)
                if best.leaves is None or not isinstance(kinds, list) or len(kinds) != self.number:
                    break
                if layer_distances(best.leaves, self.wanted)[index]:
                    other = [*kinds[:index], option, *kinds[index + 1 :]]
                    best = self.better(best, [set_at(best.config, path, other)])
        return best

    def likely(self, best: _Outcome, path: Path) -> list[Any]:
        """Return values of a list without options: those of the wanted model that change with it, and 0 and 1."""
        current = best.value(path)
        values = [0, 1, *(current if isinstance(current, list) else [current])]
        for probe in (values[-1] * 2, 16) if isinstance(values[-1], int | float) else ():
            found = self.read(set_at(best.config, path, [probe] * self.number))
            if best.leaves is not None and found.leaves is not None:
                for other in changed(best.leaves, found.leaves):
                    values += [value for value in self.wanted.of(other) if isinstance(value, int | float)]
                break
        return [value for value in values if value is not None]

    def listed(self, best: _Outcome, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the list of those layers that are nearer if they are listed, and the same as a 0 or 1 per layer."""
        without, within = (self.read(set_at(best.config, path, each)) for each in ([], list(range(self.number))))
        for low, high, as_mask in ((without, within, False), (*self.masks(best, path), True)):
            if low.leaves is not None and high.leaves is not None:
                pairs = zip(
                    layer_distances(low.leaves, self.wanted), layer_distances(high.leaves, self.wanted), strict=False
                )
                flags = [inside < outside for outside, inside in pairs]
                chosen = [int(each) for each in flags] if as_mask else [i for i, each in enumerate(flags) if each]
                yield set_at(best.config, path, chosen)

    def masks(self, best: _Outcome, path: Path) -> tuple[_Outcome, _Outcome]:
        zeros, ones = (self.read(set_at(best.config, path, [value] * self.number)) for value in (0, 1))
        return zeros, ones

    def rope(self, best: _Outcome) -> _Outcome:
        """Set `rope_parameters`, once or for each type of layer."""
        shapes = self.shapes + [rope_fields(position) for position in positions_of(self.spec.layers)]
        shapes += [{k: v for k, v in each.items() if k != "partial_rotary_factor"} for each in shapes]
        shapes = [each for index, each in enumerate(shapes) if each not in shapes[:index]]
        for position in positions_of(self.spec.layers):
            lengths = (getattr(position.scaling, "length", None), getattr(position.scaling, "original_length", None))
            if lengths[0] is not None:
                best = self.better(best, [set_at(best.config, ("max_position_embeddings",), lengths[1])])
        asked: set[Path] = set()
        for shape in shapes:
            found = self.read(set_at(best.config, _ROPE, shape))
            asked |= _types_asked(found)
            best = found if found.cost < best.cost else best
        if not asked or not shapes:
            return best
        inner = get_at(best.config, _ROPE) or {}
        own: dict[str, Any] = {}
        nested = best
        while asked:  # a family looks for one type after the other
            own |= {path[-1]: inner.get(path[-1], shapes[0]) for path in sorted(asked)}
            nested = self.read(set_at(best.config, _ROPE, own))
            asked = {path for path in _types_asked(nested) if path[-1] not in own}
        for name in own:
            nested = self.better(nested, [set_at(nested.config, (*_ROPE, name), each) for each in (*shapes, None)])
        return nested if nested.cost < best.cost else best

    # --- numbers ---------------------------------------------------------------------------------------------------

    def links(self, best: _Outcome, known: Links) -> Links:
        """Return how values of the spec follow from each field, as the inverse of each by the value's path.

        `known`: those found before; they are kept where all values that follow from a field are right.
        """
        found: Links = {}
        if best.leaves is None:
            return found
        open_paths = set(changed(best.leaves, self.wanted))
        for path, read in best.reads.items():
            if path in known and not open_paths.intersection(known[path]):
                found[path] = known[path]
                continue
            value = best.value(path)
            possible = False
            for probe in probes(read, value):
                other = self.read(self.with_value(best.config, path, probe))
                if other.leaves is None:
                    continue
                possible = True
                differs = changed(best.leaves, other.leaves)
                for name, (old, new) in differs.items():
                    inverse = inverse_of(value, probe, old, new)
                    found.setdefault(path, {}).setdefault(name, inverse or unknown)
                if differs:
                    break
            if not possible and is_number(value) and path not in self.partners:
                self.find_partner(best, path)
        return found

    def find_partner(self, best: _Outcome, path: Path) -> None:
        """Find a field that must have the same value as this one."""
        value = best.value(path)
        for other in best.reads:
            if other != path and best.value(other) == value and type(best.value(other)) is type(value):
                probed = set_at(set_at(best.config, path, 2 * value), other, 2 * value)
                if self.read(probed).leaves is not None:
                    self.partners[path] = other
                    return

    def with_value(self, config: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
        """Return the config with another value of a field, and of the one that must be equal to it."""
        found = set_at(config, path, value)
        return set_at(found, self.partners[path], value) if path in self.partners else found

    def jumps(self, best: _Outcome, links: Links) -> Iterator[dict[str, Any]]:
        """Yield the config with all fields set whose value follows from the wanted spec."""
        assert best.leaves is not None
        open_paths = set(changed(best.leaves, self.wanted))
        for everything, options in ((False, True), (False, False), (True, True), (True, False)):
            config = best.config
            for path, inverses in links.items():
                asked = self.proposals(best.reads[path], inverses, open_paths)
                wanted = everything or open_paths.intersection(inverses)
                if asked and wanted and (options or not best.reads[path].options):
                    config = self.with_value(config, path, asked[0])
            yield config

    def proposals(self, read: Read, inverses: Mapping[str, Inverse], open_paths: Container[str]) -> list[Any]:
        """Return the values of a field that the wanted spec asks for: first those that are the same there."""
        found: list[Any] = []
        for name, inverse in sorted(
            inverses.items(), key=lambda item: (item[1] is not same, item[0] not in open_paths)
        ):
            for value in self.wanted.of(name):
                proposed = inverse(value)
                if proposed is not None and (read.kind != "number" or not isinstance(proposed, bool)):
                    whole = read.kind in ("whole", "positive", "whole or null")
                    if not whole or abs(proposed - round(proposed)) < 1e-6:
                        found.append(round(proposed) if whole else proposed)
        return [value for index, value in enumerate(found) if value not in found[:index]]

    def numbers(self, best: _Outcome, path: Path, inverses: Mapping[str, Inverse]) -> Iterator[dict[str, Any]]:
        """Yield configs with other values of one field, if values that differ from the wanted ones follow from it."""
        assert best.leaves is not None
        read = best.reads[path]
        open_paths = set(changed(best.leaves, self.wanted))
        if read.kind in ("per layer", "layers", "object") or not open_paths.intersection(inverses):
            return
        values = self.proposals(read, inverses, open_paths)
        if read.kind in ("whole", "whole or null"):
            values.append(0 if read.kind == "whole" else None)
        if read.kind == "number":
            values += [0.0, *(math.nextafter(value, way) for value in values for way in (0, math.inf))]
        plain = bool(values) and any(inverse is same and name in open_paths for name, inverse in inverses.items())
        if read.kind in ("whole", "positive", "whole or null") and not plain:
            values += self.edges
        for index, value in enumerate(values[:_MOST_CANDIDATES]):
            if value != best.value(path) and value not in values[:index]:
                yield self.with_value(best.config, path, value)

    # --- the whole config ------------------------------------------------------------------------------------------

    def complete(self, best: _Outcome) -> dict[str, Any]:
        """Return the config with every field that is read written out."""
        found = best.config
        explicit = {path: best.value(path) for path in best.reads if best.value(path) is not None}
        whole = self.read(reduce(lambda config, item: set_at(config, *item), explicit.items(), found))
        if whole.cost == best.cost:
            found, explicit = whole.config, {}
        # One by one, if an older spelling of a field has another default, or an alternative of it is there.
        for path, value in (explicit | best.fields.expected).items():
            if path[0] != _ROPE[0] and get_at(found, path) is None:
                other = set_at(found, path, value)
                found = other if self.read(other).cost == best.cost else found
        return {**self.start, **found}


def _types_asked(found: _Outcome) -> set[Path]:
    types = {option for read in found.reads.values() if read.kind == "per layer" for option in read.options}
    asked = {path for path in found.fields.asked if path[:-1] == _ROPE}
    return {path for path in asked if path[-1].endswith("attention") or path[-1] in types}
