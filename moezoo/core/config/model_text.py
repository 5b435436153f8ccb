"""YAML of a model as a person would write it: without defaults, and each repeated part once."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from moezoo.core.spec import LayerSpec, ModelSpec, with_repeats
from moezoo.core.spec.base import Part

_WIDTH = 118


def model_text(spec: ModelSpec) -> str:
    """Return the YAML text `model: ...` of a spec; parsing it gives an equal spec.

    Fields with their default values are left out. Consecutive equal layers become one with `repeat`, and a layer or a
    part of one that occurs again is an alias of its first occurrence.
    """
    layers = with_repeats(spec.layers)
    written = _Parts()
    raw = written.fields(spec.model_copy(update={"layers": ()}))
    bodies = [layer.model_copy(update={"repeat": 1}) for layer in layers]
    raw["layers"] = [
        written.part(body) if layer.repeat == 1 else {"repeat": layer.repeat, **written.fields(body)}
        for layer, body in zip(layers, bodies, strict=True)
    ]
    ordered = {name: raw[name] for name in ModelSpec.model_fields if name in raw}
    return yaml.dump({"model": ordered}, Dumper=_dumper(written.names()), sort_keys=False, width=_WIDTH)


class _Parts:
    """Parts as plain mappings; equal parts are the same object, so that YAML can name it."""

    def __init__(self) -> None:
        self._written: list[tuple[Part, str, dict[str, Any]]] = []

    def part(self, part: Part, role: str = "") -> dict[str, Any]:
        """Return the mapping of a part; `role` is the field that has it, which names its anchor."""
        for known, _, raw in self._written:
            if type(known) is type(part) and known == part:
                return raw
        raw = self.fields(part)
        if isinstance(part, LayerSpec):
            block = part.attention.kind if part.mixer_only else "moe" if part.moe is not None else "dense"
            role = f"{block}_layer"
        self._written.append((part, role, raw))
        return raw

    def fields(self, part: Part) -> dict[str, Any]:
        """Return the fields of a part that differ from their defaults, and its kind where the reader needs it."""
        raw: dict[str, Any] = {}
        for name, field in type(part).model_fields.items():
            value = getattr(part, name)
            if name == "kind" or field.is_required() or value != field.get_default(call_default_factory=True):
                raw[name] = self._value(value, name)
        for name, value in list(raw.items()):
            if isinstance(value, dict) and "kind" in value:
                short = {key: inner for key, inner in value.items() if key != "kind"}
                if _reads_as(type(part), {**raw, name: short}, part):
                    del value["kind"]
        return raw

    def _value(self, value: Any, name: str) -> Any:
        if isinstance(value, Part):
            return self.part(value, name)
        if isinstance(value, tuple | list):
            return [self._value(inner, name) for inner in value]
        return value

    def names(self) -> Mapping[int, str]:
        """Return the anchor of each mapping by its id: its role, with a number where several have the role."""
        roles: dict[str, list[int]] = {}
        for _, role, raw in self._written:
            roles.setdefault(role, []).append(id(raw))
        return dict(_numbered(roles))


def _numbered(roles: Mapping[str, list[int]]) -> Iterator[tuple[int, str]]:
    for role, found in roles.items():
        for number, key in enumerate(found):
            yield key, role if len(found) == 1 else f"{role}_{number}"


def _reads_as(kind: type[Part], raw: Mapping[str, Any], part: Part) -> bool:
    try:
        return kind.model_validate(raw) == part
    except ValidationError:
        return False


def _dumper(names: Mapping[int, str]) -> type[yaml.SafeDumper]:
    """Return a dumper that names anchors, and writes a mapping without inner mappings on one line."""

    class Dumper(yaml.SafeDumper):
        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

        def generate_anchor(self, node: yaml.Node) -> str:
            found = (names[key] for key, known in self.represented_objects.items() if known is node and key in names)
            return next(found, "") or str(super().generate_anchor(node))

        def represent_float(self, data: float) -> yaml.ScalarNode:
            node = super().represent_float(data)
            if "e" in node.value and "." not in node.value:  # YAML 1.1 reads 1e-06 as text
                node.value = node.value.replace("e", ".0e")
            return node

        def represent_part(self, data: dict[str, Any]) -> yaml.MappingNode:
            node = self.represent_mapping("tag:yaml.org,2002:map", data.items())
            node.flow_style = _is_short(data)
            return node

    Dumper.add_representer(dict, Dumper.represent_part)
    Dumper.add_representer(float, Dumper.represent_float)
    return Dumper


def _is_short(value: Mapping[Any, Any]) -> bool:
    """True if a mapping fits on one line: its values are plain, and it is not long."""
    plain = all(not isinstance(inner, dict | list) for inner in value.values())
    return plain and sum(len(f"{name}: {inner}, ") for name, inner in value.items()) < 96
