"""The family whose config.json has the most in common with one of an unknown model type: by fields, not by spelling."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.fields import HARMLESS, Fields
from moezoo.core.huggingface.inverse.reads import RecordedFields

Reader = tuple[Callable[[Fields], Any], Sequence[str]]

_LAYERS, _VOCAB = 7, 1 << 15  # of the model by whose reading a family's fields are found
_FEWEST = 5  # fewer fields say nothing about an architecture
_MOST_NAMED = 4


@dataclass(frozen=True)
class NearestFamily:
    """A family by its fields: how many of a config's fields it reads, and those that it does not know."""

    name: str
    read: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def words(self) -> str:
        """A sentence for an error."""
        named = f", and not {', '.join(self.unread[:_MOST_NAMED])}" if self.unread else ""
        more = f" and {len(self.unread) - _MOST_NAMED} more" if self.unread[_MOST_NAMED:] else ""
        return (
            f"{self.name}, which reads {len(self.read)} of its {len(self.read) + len(self.unread)} fields{named}{more}"
        )


def nearest_family(fields: Fields, readers: Mapping[str, Reader]) -> NearestFamily | None:
    """Return the family with the most in common with a config, or None if it has too few fields.

    A field counts more if fewer families read it, and not at all if the family refuses its value. `readers`: by
    the family's name, the function that reads the config, and patterns of fields without effect.
    """
    present = {
        name: value
        for name, value in fields.present.items()
        if not any(fnmatchcase(name, pattern) for pattern in (*HARMLESS, "max_position_embeddings"))
    }
    known = {name: _fields_of(read) for name, (read, _) in readers.items()}
    users = Counter(name for each in known.values() for name in each)
    if sum(name in users for name in present) < _FEWEST:
        return None

    def weight(names: set[str]) -> float:
        return sum(math.log1p(len(known) / max(users[name], 1)) for name in names)

    def common(family: str) -> float:
        shared = {name for name, value in present.items() if known[family].get(name, _refused)(value)}
        return weight(shared) / weight(set(present) | set(known[family]))

    found = max(sorted(known), key=common)
    harmless = readers[found][1]
    read = [name for name in present if name in known[found] or any(fnmatchcase(name, each) for each in harmless)]
    return NearestFamily(found, tuple(read), tuple(name for name in present if name not in read))


def _refused(value: Any) -> bool:
    return False


def _fields_of(read: Callable[[Fields], Any]) -> dict[str, Callable[[Any], bool]]:
    """Return the names of the fields that a family reads, each with a test of values that it may have."""
    fields = RecordedFields({}, _LAYERS, _VOCAB)
    with suppress(SpecError, ArithmeticError, ValueError, TypeError):
        read(fields)
    names = (path[0] for path in (*fields.asked, *fields.expected, *fields.reads))
    found: dict[str, Callable[[Any], bool]] = dict.fromkeys(names, _any)
    found |= {path[0]: partial(_like, value) for path, value in fields.expected.items() if len(path) == 1}
    return found | {
        path[0]: partial(_among, each.options) for path, each in fields.reads.items() if len(path) == 1 and each.options
    }


def _like(value: Any, given: Any) -> bool:
    return given == value or not isinstance(value, bool | str)


def _among(options: Sequence[Any], given: Any) -> bool:
    return all(item in options for item in (given if isinstance(given, list) else [given]))


def _any(value: Any) -> bool:
    return True
