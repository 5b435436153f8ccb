"""A grammar as data: its YAML file, its pieces, and the rules that make its entropy exact.

A grammar file has a `start` template, an `end` marker and `lists` of options. A template is text with
references:

    {place}                 a choice from the list `place`
    {hero=animal}           the same, remembered as `hero`
    {rival=animal-hero}     the same, but never the option that `hero` is
    {hero}                  the text of what was chosen for `hero`, again
    {hero.home}             the attribute `home` of what was chosen for `hero`: a template of its own

An option is a text, or a mapping with `text`, an integer `weight` (1 unless given) and attributes. Every text
is a template.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from moezoo.core.config.yaml_file import parse_mapping
from moezoo.core.errors import SpecError, nearest

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REFERENCE = re.compile(r"\{([^{}]*)\}")
_KEYS = ("end", "start", "lists")


@dataclass(frozen=True, slots=True)
class Literal:
    """Text as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Choose:
    """One option of a list, none of those remembered under `excluded`; remembered under `name`, if given."""

    source: str
    name: str | None
    excluded: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Say:
    """The text of the option remembered under `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """A template that the option remembered under `name` carries."""

    name: str
    attribute: str


Piece = Literal | Choose | Say | Attribute
Template = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One member of a list."""

    template: Template
    weight: int
    attributes: Mapping[str, Template]

    @property
    def opening(self) -> str:
        """The literal that the option begins with: what tells it from the others of its list."""
        first = self.template[0] if self.template else Literal("")
        return first.text if isinstance(first, Literal) else ""


@dataclass(frozen=True, slots=True)
class GrammarFile:
    """A grammar that has passed every check."""

    where: str
    end: str
    start: Template
    lists: Mapping[str, tuple[Option, ...]]
    variables: Mapping[str, str]  # remembered name -> the list that it is chosen from


def parse_grammar_file(text: str, where: str = "grammar") -> GrammarFile:
    """Read a grammar and check every rule that its entropy rests on.

    Raises SpecError: not YAML, an unknown key or name, a list that contains itself, options that their
    openings do not tell apart, a name read before it is chosen, the end marker inside a document.
    """
    raw = parse_mapping(text, where, "grammar")
    for key in raw:
        if key not in _KEYS:
            raise SpecError(f"{key} is not a known key{nearest(str(key), _KEYS)} ({where}). Known: {', '.join(_KEYS)}.")
    for key, kind in (("end", str), ("start", str), ("lists", dict)):
        if not isinstance(raw.get(key), kind) or not raw[key]:
            raise SpecError(
                f"{key} is {raw.get(key)!r}; expected a {kind.__name__} that is not empty ({where}). Give it."
            )
    lists = {_name(name, where): _options(name, options, where) for name, options in raw["lists"].items()}
    start = _template(raw["start"], "start", where)
    variables = _variables(start, lists, where)
    grammar = GrammarFile(where, raw["end"], _resolve(start, variables), _resolve_lists(lists, variables), variables)
    _Checks(grammar).run()
    return grammar


# --- reading ------------------------------------------------------------------------------------------------


def _name(name: object, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SpecError(f"{name!r} is not a name; expected lowercase letters, digits and _ ({where}). Rename it.")
    return name


def _options(name: str, raw: object, where: str) -> tuple[Option, ...]:
    if not isinstance(raw, list) or not raw:
        raise SpecError(f"lists.{name} is {raw!r}; expected a list of options ({where}). Give at least one.")
    options = []
    for number, entry in enumerate(raw):
        place = f"lists.{name}[{number}]"
        fields = dict(entry) if isinstance(entry, dict) else {"text": entry}
        weight = fields.pop("weight", 1)
        if type(weight) is not int or weight < 1:
            raise SpecError(f"{place}.weight is {weight!r}; expected a positive integer ({where}). Mend it.")
        template = _template(fields.pop("text", None), f"{place}.text", where)
        attributes = {_name(key, where): _template(text, f"{place}.{key}", where) for key, text in fields.items()}
        options.append(Option(template, weight, attributes))
    for number, option in enumerate(options):
        if option.attributes.keys() != options[0].attributes.keys():
            given, first = sorted(option.attributes), sorted(options[0].attributes)
            raise SpecError(
                f"lists.{name}[{number}] has the attributes {given}, but lists.{name}[0] has {first} "
                f"({where}). "
                "Give all options of a list the same attributes."
            )
    return tuple(options)


def _template(text: object, place: str, where: str) -> Template:
    """Split a text into pieces. A bare `{x}` becomes Say, until `_resolve` knows which names are lists."""
    if not isinstance(text, str):
        raise SpecError(f"{place} is {text!r}; expected a text ({where}). Quote it.")
    pieces: list[Piece] = []
    for number, part in enumerate(_REFERENCE.split(text)):
        if number % 2:
            pieces.append(_reference(part, place, where))
        elif part:
            if "{" in part or "}" in part:
                raise SpecError(f"{place} has a brace without its partner; got {part!r} ({where}). Write {{name}}.")
            pieces.append(Literal(part))
    return tuple(pieces)


def _reference(inside: str, place: str, where: str) -> Piece:
    match = re.fullmatch(r"(?:(\w+)=)?(\w+)((?:-\w+)*)(?:\.(\w+))?", inside)
    names = re.split(r"[=.-]", inside)
    if not match or not all(_NAME.fullmatch(name) for name in names) or (match[4] and (match[1] or match[3])):
        raise SpecError(
            f"{place} has the reference {{{inside}}}; expected {{list}}, {{name=list}}, {{name=list-other}}, "
            f"{{name}} or "
            f"{{name.attribute}} ({where}). Mend it."
        )
    if match[4]:
        return Attribute(match[2], match[4])
    if match[1] or match[3]:
        return Choose(match[2], match[1], tuple(match[3].split("-")[1:]))
    return Say(match[2])


def _variables(start: Template, lists: Mapping[str, tuple[Option, ...]], where: str) -> dict[str, str]:
    variables: dict[str, str] = {}
    for piece in _all_pieces(start, lists):
        if not isinstance(piece, Choose):
            continue
        if piece.source not in lists:
            raise SpecError(
                f"no list is called {piece.source!r}{nearest(piece.source, lists)} ({where}). Mend the reference."
            )
        if piece.name is not None and variables.setdefault(piece.name, piece.source) != piece.source:
            raise SpecError(
                f"{piece.name!r} is chosen from {piece.source!r} and from {variables[piece.name]!r}; "
                f"expected one list ({where}). "
                "Use two names."
            )
        if piece.name in lists:
            raise SpecError(
                f"{piece.name!r} is a list and a remembered choice; expected one of them ({where}). Rename one."
            )
    return variables


def _resolve(template: Template, variables: Mapping[str, str]) -> Template:
    """Say of anything but a remembered name is a choice from the list of that name."""
    return tuple(
        Choose(piece.name, None, ()) if isinstance(piece, Say) and piece.name not in variables else piece
        for piece in template
    )


def _resolve_lists(
    lists: Mapping[str, tuple[Option, ...]], variables: Mapping[str, str]
) -> dict[str, tuple[Option, ...]]:
    return {
        name: tuple(
            Option(
                _resolve(option.template, variables),
                option.weight,
                {key: _resolve(template, variables) for key, template in option.attributes.items()},
            )
            for option in options
        )
        for name, options in lists.items()
    }


def _all_pieces(start: Template, lists: Mapping[str, tuple[Option, ...]]) -> Iterator[Piece]:
    yield from start
    for options in lists.values():
        for option in options:
            yield from option.template
            for template in option.attributes.values():
                yield from template


# --- checking -----------------------------------------------------------------------------------------------


class _Checks:
    """What must hold so that text determines its derivation, and derivations end."""

    def __init__(self, grammar: GrammarFile) -> None:
        self.grammar = grammar
        self.where = grammar.where
        self.used: set[str] = set()
        self.tails: dict[tuple[Template, frozenset[str]], frozenset[str]] = {}

    def run(self) -> None:
        self._names_exist()
        self._openings_tell_apart()
        self._walk(self.grammar.start, frozenset(), ())
        for name in self.grammar.lists:
            if name not in self.used:
                raise SpecError(f"lists.{name} is never used ({self.where}). Use it or remove it.")
        end = self.grammar.end
        tails = self._tails(self.grammar.start, frozenset({end[1:]}))
        self._literal_tails(end, tails, allowed=True)

    def _names_exist(self) -> None:
        lists, variables = self.grammar.lists, self.grammar.variables
        for piece in _all_pieces(self.grammar.start, lists):
            match piece:
                case Choose():
                    if piece.source not in lists:
                        near = nearest(piece.source, [*lists, *variables])
                        raise SpecError(f"nothing is called {piece.source!r}{near} ({self.where}). Mend the reference.")
                    for name in piece.excluded:
                        if variables.get(name) != piece.source:
                            raise SpecError(
                                f"{{{piece.source}-{name}}} excludes {name!r}, which is not chosen from "
                                f"{piece.source!r} "
                                f"({self.where}). Exclude a name that is."
                            )
                    if len(piece.excluded) >= len(lists[piece.source]):
                        raise SpecError(
                            f"{{{piece.source}-{'-'.join(piece.excluded)}}} may leave no option of "
                            f"{len(lists[piece.source])} "
                            f"({self.where}). Add options."
                        )
                case Attribute():
                    if piece.name not in variables:
                        near = nearest(piece.name, variables)
                        raise SpecError(
                            f"nothing is remembered as {piece.name!r}{near} ({self.where}). Choose it first."
                        )
                    known = lists[variables[piece.name]][0].attributes
                    if piece.attribute not in known:
                        near = nearest(piece.attribute, known)
                        raise SpecError(
                            f"{piece.name} has no attribute {piece.attribute!r}{near} ({self.where}). Give it."
                        )
                case Say():
                    for option in lists[variables[piece.name]]:
                        if not is_plain(option.template):
                            raise SpecError(
                                f"{{{piece.name}}} repeats an option that is not plain text (list "
                                f"{variables[piece.name]!r}, "
                                f"{option.opening!r}; {self.where}). Repeat an attribute, or make the option "
                                f"plain."
                            )
                case Literal():
                    pass

    def _openings_tell_apart(self) -> None:
        for name, options in self.grammar.lists.items():
            if len(options) == 1:
                continue
            openings = sorted(option.opening for option in options)
            if not openings[0]:
                raise SpecError(
                    f"lists.{name} has an option that does not begin with literal text ({self.where}). Text "
                    f"must tell the "
                    "options of a list apart: begin each with a literal of its own."
                )
            # Trap: in sorted order, whatever a text is a prefix of follows it directly, so neighbours are
            # enough.
            for first, second in pairwise(openings):
                if second.startswith(first):
                    raise SpecError(
                        f"lists.{name} is ambiguous; got {first!r}, a prefix of {second!r}; expected "
                        f"openings (the literal before "
                        f"the first reference) none of which is a prefix of another ({self.where}). Reword "
                        f"one."
                    )

    def _walk(self, template: Template, bound: frozenset[str], inside: tuple[str, ...]) -> frozenset[str]:
        """The names surely remembered after a template. Refuses a name read too early, and a list within itself."""
        for piece in template:
            match piece:
                case Choose():
                    if piece.source in inside:
                        path = " -> ".join([*inside, piece.source])
                        raise SpecError(
                            f"lists.{piece.source} contains itself ({path}; {self.where}). Documents must end."
                        )
                    self.used.add(piece.source)
                    self._require(piece.excluded, bound)
                    parts = [option.template for option in self.grammar.lists[piece.source]]
                    path_inside = (*inside, piece.source)
                    bound = self._walk_any(parts, bound, path_inside) | ({piece.name} if piece.name else set())
                case Attribute():
                    self._require((piece.name,), bound)
                    source, key = self.grammar.variables[piece.name], f"{piece.name}.{piece.attribute}"
                    if key in inside:
                        raise SpecError(f"{key} contains itself ({self.where}). Documents must end.")
                    parts = [option.attributes[piece.attribute] for option in self.grammar.lists[source]]
                    bound = self._walk_any(parts, bound, (*inside, key))
                case Say():
                    self._require((piece.name,), bound)
                case Literal():
                    pass
        return bound

    def _walk_any(self, parts: list[Template], bound: frozenset[str], inside: tuple[str, ...]) -> frozenset[str]:
        return frozenset.intersection(*(self._walk(part, bound, inside) for part in parts))

    def _require(self, names: tuple[str, ...], bound: frozenset[str]) -> None:
        for name in names:
            if name not in bound:
                raise SpecError(
                    f"{name!r} is used before it is surely chosen ({self.where}). Write {{{name}=list}} earlier."
                )

    def _tails(self, template: Template, before: frozenset[str]) -> frozenset[str]:
        """The last `len(end) - 1` characters that may stand after a template, given those before it."""
        found = self.tails.get((template, before))
        if found is not None:
            return found
        tails = before
        for piece in template:
            match piece:
                case Literal():
                    tails = self._literal_tails(piece.text, tails)
                case Choose():
                    parts = [option.template for option in self.grammar.lists[piece.source]]
                    tails = frozenset().union(*(self._tails(part, tails) for part in parts))
                case Say():
                    parts = [option.template for option in self.grammar.lists[self.grammar.variables[piece.name]]]
                    tails = frozenset().union(*(self._tails(part, tails) for part in parts))
                case Attribute():
                    options = self.grammar.lists[self.grammar.variables[piece.name]]
                    tails = frozenset().union(*(self._tails(o.attributes[piece.attribute], tails) for o in options))
        self.tails[template, before] = tails
        return tails

    def _literal_tails(self, text: str, before: frozenset[str], allowed: bool = False) -> frozenset[str]:
        end, keep = self.grammar.end, len(self.grammar.end) - 1
        for tail in before:
            at = (tail + text).find(end)
            if at != (len(tail) if allowed else -1):
                raise SpecError(
                    f"the end marker {end!r} may stand inside a document, at {text!r} ({self.where}); "
                    f"expected it at the end "
                    "alone, so that text shows where documents begin. Reword."
                )
        return frozenset((tail + text)[len(tail + text) - min(keep, len(tail + text)) :] for tail in before)


def is_plain(template: Template) -> bool:
    """Whether a template is text without references."""
    return all(isinstance(piece, Literal) for piece in template)
