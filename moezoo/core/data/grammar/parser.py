"""Parser of grammar files in YAML.

A grammar file has a `start` template, an `end` marker and `lists` of options. A template is text with references:

    {place}                 a choice from list `place`
    {hero=animal}           a choice from list `animal`, stored in variable `hero`
    {rival=animal-hero}     the same, without the option of `hero`
    {hero}                  the text of the option chosen for `hero`, repeated
    {hero.home}             attribute `home` of the option chosen for `hero`, which is a template

An option is a text, or a mapping with `text`, an integer `weight` (default 1) and attributes. Each of these texts is a
template.
"""

import re
from collections.abc import Mapping

from moezoo.core.config.yaml_file import parse_mapping
from moezoo.core.data.grammar.checks import check_grammar
from moezoo.core.data.grammar.pieces import (
    Attribute,
    Choose,
    GrammarFile,
    Literal,
    Option,
    Piece,
    Say,
    Template,
    all_pieces,
)
from moezoo.core.errors import SpecError, nearest

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REFERENCE = re.compile(r"\{([^{}]*)\}")
_KEYS = ("end", "start", "lists")


def parse_grammar_file(text: str, where: str = "grammar") -> GrammarFile:
    """Parse and validate a grammar; `where` names it in errors.

    Raises SpecError: not YAML, an unknown key or name, a list that contains itself, options with ambiguous
    openings, a variable used before it is chosen, the end marker inside a document.
    """
    raw = parse_mapping(text, where, "grammar")
    for key in raw:
        if key not in _KEYS:
            raise SpecError(f"{key} is not a known key{nearest(str(key), _KEYS)} ({where}). Known: {', '.join(_KEYS)}.")
    for key, kind in (("end", str), ("start", str), ("lists", dict)):
        if not isinstance(raw.get(key), kind) or not raw[key]:
            raise SpecError(f"{key} is {raw.get(key)!r:.80}; expected a non-empty {kind.__name__} ({where}). Add it.")
    lists = {_name(name, where): _options(name, options, where) for name, options in raw["lists"].items()}
    start = _template(raw["start"], "start", where)
    variables = _variables(start, lists, where)
    grammar = GrammarFile(where, raw["end"], _resolve(start, variables), _resolve_lists(lists, variables), variables)
    check_grammar(grammar)
    return grammar


def _name(name: object, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SpecError(f"{name!r:.80} is not a name; expected lowercase letters, digits and _ ({where}). Rename it.")
    return name


def _options(name: str, raw: object, where: str) -> tuple[Option, ...]:
    if not isinstance(raw, list) or not raw:
        raise SpecError(f"lists.{name} is {raw!r:.80}; expected a list of options ({where}). Add at least one.")
    options = []
    for number, entry in enumerate(raw):
        place = f"lists.{name}[{number}]"
        fields = dict(entry) if isinstance(entry, dict) else {"text": entry}
        weight = fields.pop("weight", 1)
        if type(weight) is not int or weight < 1:
            raise SpecError(f"{place}.weight is {weight!r:.80}; expected a positive integer ({where}). Fix it.")
        template = _template(fields.pop("text", None), f"{place}.text", where)
        attributes = {_name(key, where): _template(text, f"{place}.{key}", where) for key, text in fields.items()}
        options.append(Option(template, weight, attributes))
    for number, option in enumerate(options):
        if option.attributes.keys() != options[0].attributes.keys():
            own, first = sorted(option.attributes), sorted(options[0].attributes)
            raise SpecError(
                f"lists.{name}[{number}] has the attributes {own}, but lists.{name}[0] has {first} ({where}). "
                "All options of a list need the same attributes."
            )
    return tuple(options)


def _template(text: object, place: str, where: str) -> Template:
    """Split a text into pieces. `{x}` becomes Say, until `_resolve` replaces names of lists by choices."""
    if not isinstance(text, str):
        raise SpecError(f"{place} is {text!r:.80}; expected a text ({where}). Quote it.")
    pieces: list[Piece] = []
    for number, part in enumerate(_REFERENCE.split(text)):
        if number % 2:
            pieces.append(_reference(part, place, where))
        elif part:
            if "{" in part or "}" in part:
                raise SpecError(f"{place} has an unmatched brace; got {part!r:.80} ({where}). Write {{name}}.")
            pieces.append(Literal(part))
    return tuple(pieces)


def _reference(inside: str, place: str, where: str) -> Piece:
    match = re.fullmatch(r"(?:(\w+)=)?(\w+)((?:-\w+)*)(?:\.(\w+))?", inside)
    names = re.split(r"[=.-]", inside)
    if not match or not all(_NAME.fullmatch(name) for name in names) or (match[4] and (match[1] or match[3])):
        raise SpecError(
            f"{place} has the reference {{{inside}}}; expected {{list}}, {{name=list}}, {{name=list-other}}, "
            f"{{name}} or {{name.attribute}} ({where}). Fix it."
        )
    if match[4]:
        return Attribute(match[2], match[4])
    if match[1] or match[3]:
        return Choose(match[2], match[1], tuple(match[3].split("-")[1:]))
    return Say(match[2])


def _variables(start: Template, lists: Mapping[str, tuple[Option, ...]], where: str) -> dict[str, str]:
    variables: dict[str, str] = {}
    for piece in all_pieces(start, lists):
        if not isinstance(piece, Choose):
            continue
        if piece.source not in lists:
            raise SpecError(
                f"no list is called {piece.source!r:.80}{nearest(piece.source, lists)} ({where}). Fix the reference."
            )
        if piece.name is not None and variables.setdefault(piece.name, piece.source) != piece.source:
            raise SpecError(
                f"{piece.name!r:.80} is chosen from {piece.source!r:.80} and from {variables[piece.name]!r:.80}; "
                f"expected one list ({where}). Use two variables."
            )
        if piece.name in lists:
            raise SpecError(
                f"{piece.name!r} is both a list and a variable; expected one of them ({where}). Rename one."
            )
    return variables


def _resolve(template: Template, variables: Mapping[str, str]) -> Template:
    """Replace Say of a name that is not a variable by a choice from the list of that name."""
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
