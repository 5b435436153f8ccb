"""Strict YAML reader: bounded in size and depth, UTF-8, no duplicate keys, no tags."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from moezoo.core.errors import SpecError
from moezoo.core.files import located, read_bounded, reason_of

_MAX_BYTES = 1_000_000
_MAX_NODES = 50_000  # values with aliases expanded; PyYAML takes 3 s for so many, and a resolved config has thousands
_MAX_DEPTH = 50
_MAX_DIGITS = 100
_MAX_INTEGER = 2**63 - 1
_NUMBER = re.compile(
    r"[-+]?(0|[1-9][0-9]*|\.[0-9]+|[0-9]+\.[0-9]*)(e[-+]?[0-9]+)?|0x[0-9a-f]+|[-+]?\.inf|\.nan", re.IGNORECASE
)


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path: the file.
        what: what the file is, for errors: config, recipe, grammar.

    Raises SpecError: no such file, too large, not UTF-8, not YAML, a duplicate key, or not a mapping.
    """
    return parse_mapping(read_text(path, what), str(path), what)


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a YAML file. Raises SpecError: no such file, too large, or not UTF-8."""
    try:
        return read_bounded(path, _MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise SpecError(f"no such {what}; got {located(path)}; expected a YAML file. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{what} cannot be read; got {path} ({reason_of(error)}); expected a YAML text file of at most 1 MB."
        ) from None


def parse_mapping(text: str, where: str, what: str) -> dict[str, Any]:
    """Parse YAML text that holds one mapping; `where` names the text in errors. Raises SpecError."""
    raw = parse_value(text, where)
    if not isinstance(raw, dict):
        raise SpecError(f"{where} is not a {what}; got {type(raw).__name__}; expected a mapping of keys to values.")
    return raw


def parse_value(text: str, where: str) -> Any:
    """Parse YAML text that may hold any value: text, numbers, true, false, null, lists, and mappings with text as keys.

    Dates and whatever needs a tag (`!!binary`) are not values here, nor are the numbers of YAML 1.1 that 1.2 gave up:
    12:30 (750), 010 (8), 0b1, 1_000. Bounded, with aliases expanded: depth, number of values, digits of a number.

    Raises SpecError, one line with the place: not YAML, not one of these values, a duplicate key, or beyond a bound.
    """
    try:
        return _StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        problem = " ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise SpecError(f"{where} is not valid YAML; got: {problem:.200}{place}. Fix or quote the value.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SpecError(
            f"{where} is not valid YAML; got: the character {chr(error.character)!r} (line {line}). Remove it."
        ) from None
    except ValueError as error:  # an escape such as \U00110000 in a quoted text
        raise SpecError(f"{where} is not valid YAML; got: {error!s:.200}. Fix or quote the value.") from None


_Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


class _StrictLoader(yaml.SafeLoader):
    """YAML loader with bounds; it refuses tags, duplicate keys, keys that are not text, and dates."""

    yaml_implicit_resolvers: _Resolvers = {  # noqa: RUF012  # as in its base class
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":value"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # of a node by id: number of nodes and depth, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self._count += 1
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _problem(f"the tag {tag}", event)
        if self._count > _MAX_NODES or self._depth >= _MAX_DEPTH:
            raise _problem(_TOO_LARGE, event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _problem(f"the alias *{event.anchor} inside of what it stands for", event)
        else:
            parts = [self._sizes[id(part)] for part in _parts(node)]
            self._sizes[id(node)] = (
                1 + sum(size for size, _ in parts),
                1 + max((depth for _, depth in parts), default=0),
            )
        size, depth = self._sizes[id(node)]
        if size > _MAX_NODES or self._depth + depth > _MAX_DEPTH:
            raise _problem(_TOO_LARGE, event)
        return node


_TOO_LARGE = f"more than {_MAX_NODES} values or {_MAX_DEPTH} levels, with aliases expanded"


def _parts(node: yaml.Node | None) -> list[yaml.Node]:
    match node:
        case yaml.SequenceNode():
            return list(node.value)
        case yaml.MappingNode():
            return [part for pair in node.value for part in pair]
        case _:
            return []


def _problem(problem: str, at: Any) -> yaml.constructor.ConstructorError:
    """Return the error for an event or node."""
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, bool) and key_node.value == "on":  # a key of adapters; PyYAML reads YAML 1.1
            key = key_node.value
        if not isinstance(key, str):
            raise _problem(f"a key that is not text but {type(key).__name__}", key_node)
        if key in result:
            raise _problem(f"the duplicate key {key!r:.80}", key_node)
        result[key] = loader.construct_object(value_node, deep=True)
    return result


def _text(loader: _StrictLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _problem("half of a surrogate pair", node)
    return text


def _integer(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    value = _number(loader.construct_yaml_int, node)
    if not -_MAX_INTEGER <= value <= _MAX_INTEGER:
        raise _problem(f"an integer of more than 64 bits, {node.value:.40}", node)
    return int(value)


def _float(loader: _StrictLoader, node: yaml.ScalarNode) -> float:
    return float(_number(loader.construct_yaml_float, node))


def _number(convert: Callable[[Any], Any], node: yaml.ScalarNode) -> Any:
    if len(node.value) > _MAX_DIGITS:
        raise _problem(f"a number of {len(node.value)} characters", node)
    if _NUMBER.fullmatch(node.value) is None:  # PyYAML reads YAML 1.1, where 010 is 8 and 12:30 is 750
        raise _problem(f"{node.value!r}, which is not a number of the form 10, -1.5, 1.0e-3 or 0x1f", node)
    return convert(node)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:str", _text)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _integer)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _float)
