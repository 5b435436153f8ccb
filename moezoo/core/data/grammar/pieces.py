"""Data structures of a parsed grammar: templates, their pieces, and options."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Literal:
    """Literal text."""

    text: str


@dataclass(frozen=True, slots=True)
class Choose:
    """A choice from list `source` without the options of the `excluded` variables; stored in variable `name` if set."""

    source: str
    name: str | None
    excluded: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Say:
    """The text of the option chosen for variable `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute template of the option chosen for variable `name`."""

    name: str
    attribute: str


Piece = Literal | Choose | Say | Attribute
Template = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a list, with its weight and attributes."""

    template: Template
    weight: int
    attributes: Mapping[str, Template]

    @property
    def opening(self) -> str:
        """Literal at the beginning of the option, which distinguishes it from the other options of its list."""
        first = self.template[0] if self.template else Literal("")
        return first.text if isinstance(first, Literal) else ""


@dataclass(frozen=True, slots=True)
class GrammarFile:
    """A validated grammar; `variables` maps each variable to the list from which it is chosen."""

    where: str
    end: str
    start: Template
    lists: Mapping[str, tuple[Option, ...]]
    variables: Mapping[str, str]


def is_plain(template: Template) -> bool:
    """Return whether a template is text without references."""
    return all(isinstance(piece, Literal) for piece in template)


def all_pieces(start: Template, lists: Mapping[str, tuple[Option, ...]]) -> Iterator[Piece]:
    """Yield the pieces of all templates of a grammar."""
    yield from start
    for options in lists.values():
        for option in options:
            yield from option.template
            for template in option.attributes.values():
                yield from template
