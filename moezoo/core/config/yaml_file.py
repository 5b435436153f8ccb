"""Strict YAML reader: limited file size, UTF-8, no duplicate keys."""

from pathlib import Path
from typing import Any

import yaml

from moezoo.core.errors import SpecError
from moezoo.core.files import read_bounded, reason_of

_MAX_BYTES = 1_000_000


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
        raise SpecError(f"no such {what}; got {path}; expected a YAML file. Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{what} cannot be read; got {path} ({reason_of(error)}); expected a YAML text file of at most 1 MB."
        ) from None


def parse_mapping(text: str, where: str, what: str) -> dict[str, Any]:
    """Parse YAML text that holds one mapping; `where` names the text in errors. Raises SpecError."""
    try:
        raw = parse_value(text)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise SpecError(f"{where} is not valid YAML; got: {problem}. Fix the file.") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{where} is not a {what}; got {type(raw).__name__}; expected a mapping of keys to values.")
    return raw


def parse_value(text: str) -> Any:
    """Parse YAML text that may hold any value. Raises SpecError for a duplicate key, yaml.YAMLError if not YAML."""
    return yaml.load(text, _StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in result:
            raise SpecError(f"duplicate key {key!r} (line {key_node.start_mark.line + 1}). Remove one of them.")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
