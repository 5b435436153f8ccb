"""Validation of grammars: rules that make the entropy exact and documents finite."""

from itertools import pairwise

from moezoo.core.data.grammar.pieces import (
    Attribute,
    Choose,
    GrammarFile,
    Literal,
    Say,
    Template,
    all_pieces,
    is_plain,
)
from moezoo.core.errors import SpecError, nearest


def check_grammar(grammar: GrammarFile) -> None:
    """Check that the text determines its derivation and that documents end. Raises SpecError."""
    _Checks(grammar).run()


class _Checks:
    def __init__(self, grammar: GrammarFile) -> None:
        self.grammar = grammar
        self.where = grammar.where
        self.used: set[str] = set()
        self.tails: dict[tuple[Template, frozenset[str]], frozenset[str]] = {}

    def run(self) -> None:
        self._check_names()
        self._check_openings()
        self._walk(self.grammar.start, frozenset(), ())
        for name in self.grammar.lists:
            if name not in self.used:
                raise SpecError(f"lists.{name} is never used ({self.where}). Use it or remove it.")
        end = self.grammar.end
        tails = self._tails(self.grammar.start, frozenset({end[1:]}))
        self._literal_tails(end, tails, allowed=True)

    def _check_names(self) -> None:
        for piece in all_pieces(self.grammar.start, self.grammar.lists):
            match piece:
                case Choose():
                    self._check_choice(piece)
                case Attribute():
                    self._check_attribute(piece)
                case Say():
                    self._check_repeat(piece)
                case Literal():
                    pass

    def _check_choice(self, piece: Choose) -> None:
        lists, variables = self.grammar.lists, self.grammar.variables
        if piece.source not in lists:
            near = nearest(piece.source, [*lists, *variables])
            raise SpecError(
                f"no list or variable is called {piece.source!r:.80}{near} ({self.where}). Fix the reference."
            )
        for name in piece.excluded:
            if variables.get(name) != piece.source:
                raise SpecError(
                    f"{{{piece.source}-{name}}} excludes {name!r:.80}, which is not chosen from {piece.source!r:.80} "
                    f"({self.where}). Exclude a variable that is."
                )
        if len(piece.excluded) >= len(lists[piece.source]):
            raise SpecError(
                f"{{{piece.source}-{'-'.join(piece.excluded)}}} may exclude all {len(lists[piece.source])} options "
                f"({self.where}). Add options."
            )

    def _check_attribute(self, piece: Attribute) -> None:
        variables = self.grammar.variables
        if piece.name not in variables:
            near = nearest(piece.name, variables)
            raise SpecError(f"no variable is called {piece.name!r}{near} ({self.where}). Choose it first.")
        known = self.grammar.lists[variables[piece.name]][0].attributes
        if piece.attribute not in known:
            near = nearest(piece.attribute, known)
            raise SpecError(f"{piece.name} has no attribute {piece.attribute!r}{near} ({self.where}). Add it.")

    def _check_repeat(self, piece: Say) -> None:
        source = self.grammar.variables[piece.name]
        for option in self.grammar.lists[source]:
            if not is_plain(option.template):
                raise SpecError(
                    f"{{{piece.name}}} repeats an option that is not plain text (list {source!r}, "
                    f"{option.opening!r}; {self.where}). Repeat an attribute, or make the option plain text."
                )

    def _check_openings(self) -> None:
        for name, options in self.grammar.lists.items():
            if len(options) == 1:
                continue
            openings = sorted(option.opening for option in options)
            if not openings[0]:
                raise SpecError(
                    f"lists.{name} has an option that does not begin with literal text ({self.where}). "
                    "Begin each option of a list with a different literal."
                )
            # Trap: in sorted order, a text directly precedes the texts of which it is a prefix, so that comparing
            # neighbors is sufficient.
            for first, second in pairwise(openings):
                if second.startswith(first):
                    raise SpecError(
                        f"lists.{name} is ambiguous; got {first!r}, a prefix of {second!r}; expected openings (the "
                        f"literal before the first reference) that are not prefixes of each other ({self.where}). "
                        "Reword one."
                    )

    def _walk(self, template: Template, bound: frozenset[str], inside: tuple[str, ...]) -> frozenset[str]:
        """Return the variables that are always set after a template.

        Raises SpecError: a variable that may be used before it is chosen, or a list that contains itself.
        """
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
                    f"{name!r} may be used before it is chosen ({self.where}). Write {{{name}=list}} earlier."
                )

    def _tails(self, template: Template, before: frozenset[str]) -> frozenset[str]:
        """Return the possible last `len(end) - 1` characters after a template, for those possible before it."""
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
                    f"the end marker {end!r} may occur inside a document, at {text!r} ({self.where}); expected it "
                    "only at the end, since it marks where documents begin. Reword the text."
                )
        return frozenset((tail + text)[len(tail + text) - min(keep, len(tail + text)) :] for tail in before)
