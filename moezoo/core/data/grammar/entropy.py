"""Probabilities of a grammar: distribution of each choice, and exact expectations over all documents."""

import math
from bisect import bisect_right
from collections.abc import Callable, Generator, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moezoo.core.data.grammar.pieces import (
    Attribute,
    Choose,
    GrammarFile,
    Literal,
    Option,
    Piece,
    Say,
    Template,
    is_plain,
)

Chosen = Mapping[str, int]  # variable -> index of the chosen option


class Derivation:
    """Options of each choice of a grammar, conditional on earlier choices."""

    def __init__(self, file: GrammarFile) -> None:
        self.file = file
        self._known: dict[tuple[str, frozenset[int]], Odds] = {}

    def odds(self, piece: Choose, chosen: Chosen) -> "Odds":
        """Return the distribution of a choice, conditional on earlier choices."""
        excluded = frozenset(chosen[name] for name in piece.excluded)
        key = (piece.source, excluded)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Odds(self.file.lists[piece.source], excluded)
        return found

    def option(self, name: str, chosen: Chosen) -> Option:
        """Return the option that was chosen for a variable."""
        return self.file.lists[self.file.variables[name]][chosen[name]]


class Odds:
    """Distribution over the options of one choice: weights renormalized without the excluded options."""

    def __init__(self, options: tuple[Option, ...], excluded: frozenset[int]) -> None:
        self.numbers = [number for number in range(len(options)) if number not in excluded]
        self.options = [options[number] for number in self.numbers]
        self.openings = [option.opening for option in self.options]
        weights = [option.weight for option in self.options]
        self.total = sum(weights)
        self.weights = weights
        self.probability = [weight / self.total for weight in weights]
        self.nats = -sum(p * math.log(p) for p in self.probability)
        self._up_to = [sum(weights[: number + 1]) for number in range(len(weights))]
        self.nats_of_opening = [self._nats_along(opening) for opening in self.openings]

    def draw(self, raw: int) -> int:
        """Return a random option by weight from 64 random bits; the bias is below total / 2**64."""
        return bisect_right(self._up_to, (raw * self.total) >> 64)

    def _nats_along(self, opening: str) -> NDArray[np.float64]:
        masses = [self.total] + [
            sum(
                w
                for w, other in zip(self.weights, self.openings, strict=True)
                if other.startswith(opening[: length + 1])
            )
            for length in range(len(opening))
        ]
        return np.array([math.log(before / after) for before, after in pairwise(masses)])


class Expectation:
    """Expected sum over a document of a value per piece, by dynamic programming over the rest of the document.

    The value is `value(piece, odds)`, or with `watched` the length of the text that repeats that variable. The state
    drops variables on which the rest of the document does not depend: exclusions and branching attributes depend on
    a variable, the lengths of plain repeats do not.
    """

    def __init__(
        self, derivation: Derivation, value: Callable[[Piece, Odds | None], float] | None, watched: str | None
    ) -> None:
        self.derivation = derivation
        self.value = value
        self.watched = watched
        self.memo: dict[tuple[int, frozenset[tuple[str, int]]], float] = {}
        self.rests: dict[tuple[int, int, int], int] = {}
        self.kept: list[tuple[Template, int, int]] = []
        self.needed: list[frozenset[str]] = []
        self.reads: dict[int, list[frozenset[str]]] = {}

    def of_document(self) -> float:
        """Return the expected sum over all documents, without the end marker."""
        # Trap: recursion as deep as a document has pieces would exceed Python's limit, hence generators and a stack.
        key = self._key(self._rest(self.derivation.file.start, 0, -1), {})
        stack = [(key, self._step(*key))]
        answer: float | None = None
        while stack:
            try:
                asked = self._key(*stack[-1][1].send(answer))
            except StopIteration as done:
                answer = self.memo[stack.pop()[0]] = done.value
                continue
            answer = self.memo.get(asked)
            if answer is None:
                stack.append((asked, self._step(*asked)))
        return self.memo[key]

    def _rest(self, template: Template, index: int, after: int) -> int:
        """Return a number for `template[index:]` followed by the rest `after`; -1 is the empty rest."""
        if index == len(template):
            return after
        key = (id(template), index, after)  # ids are stable, since the grammar owns its templates
        number = self.rests.get(key)
        if number is None:
            number = self.rests[key] = len(self.kept)
            self.kept.append((template, index, after))
            later = self.needed[after] if after >= 0 else frozenset()
            self.needed.append(self._reads(template)[index] | later)
        return number

    def _reads(self, template: Template) -> list[frozenset[str]]:
        """Return for each index the variables on which the sum over `template[index:]` depends."""
        found = self.reads.get(id(template))
        if found is None:
            found = [frozenset[str]()]
            for piece in reversed(template):
                found.append(found[-1] | self._reads_of(piece))
            found.reverse()
            self.reads[id(template)] = found
        return found

    def _reads_of(self, piece: Piece) -> frozenset[str]:
        match piece:
            case Choose():
                options = [option.template for option in self.derivation.file.lists[piece.source]]
                return frozenset(piece.excluded).union(*(self._reads(option)[0] for option in options))
            case Attribute():
                branches = self._attribute(piece)
                own = piece.name == self.watched or not all(map(is_plain, branches))
                return frozenset({piece.name} if own else ()).union(*(self._reads(part)[0] for part in branches))
            case Say():
                return frozenset({piece.name} if piece.name == self.watched else ())
            case Literal():
                return frozenset()

    def _attribute(self, piece: Attribute) -> list[Template]:
        source = self.derivation.file.variables[piece.name]
        return [option.attributes[piece.attribute] for option in self.derivation.file.lists[source]]

    def _key(self, rest: int, chosen: Chosen) -> tuple[int, frozenset[tuple[str, int]]]:
        """Return a state: the rest of the document and the choices on which it depends."""
        needed = self.needed[rest] if rest >= 0 else frozenset()
        return rest, frozenset((name, number) for name, number in chosen.items() if name in needed)

    def _step(self, rest: int, state: frozenset[tuple[str, int]]) -> Generator[tuple[int, Chosen], float | None, float]:
        """Compute the sum from a state. Yields the states that it needs, and is sent their sums."""
        if rest < 0:
            return 0.0
        chosen = dict(state)
        template, index, after = self.kept[rest]
        piece = template[index]
        following = self._rest(template, index + 1, after)
        match piece:
            case Literal():
                own = self._own(piece, None)
            case Choose():
                odds = self.derivation.odds(piece, chosen)
                total, shared = self._own(piece, odds), 0.0
                matters = following >= 0 and piece.name in self.needed[following]
                for p, option, number in zip(odds.probability, odds.options, odds.numbers, strict=True):
                    then = {**chosen, piece.name: number} if piece.name is not None else chosen
                    if not is_plain(option.template):
                        total += p * _sent((yield self._rest(option.template, 0, following), then))
                        continue
                    total += p * sum(self._own(part, None) for part in option.template)
                    if matters:
                        total += p * _sent((yield following, then))
                    else:
                        shared += p  # all plain options that nothing depends on have the same next state
                if shared:
                    total += shared * _sent((yield following, chosen))
                return total
            case Say():
                watched = piece.name == self.watched
                own = _plain_length(self.derivation.option(piece.name, chosen).template) if watched else 0.0
            case Attribute():
                plain = all(map(is_plain, self._attribute(piece)))
                if not plain:
                    following = self._rest(self._branch(piece, chosen), 0, following)
                watched = plain and piece.name == self.watched
                own = _plain_length(self._branch(piece, chosen)) if watched else 0.0
        return own + _sent((yield following, chosen))

    def _branch(self, piece: Attribute, chosen: Chosen) -> Template:
        return self.derivation.option(piece.name, chosen).attributes[piece.attribute]

    def _own(self, piece: Piece, odds: Odds | None) -> float:
        return self.value(piece, odds) if self.value else 0.0


def choice_nats(piece: Piece, odds: Odds | None) -> float:
    """Return the entropy of a choice in nats, 0 for other pieces."""
    return odds.nats if odds else 0.0


def literal_length(piece: Piece, odds: Odds | None) -> float:
    """Return the number of characters of a literal, 0 for other pieces."""
    return float(len(piece.text)) if isinstance(piece, Literal) else 0.0


def _sent(answer: float | None) -> float:
    return answer if answer is not None else 0.0


def _plain_length(template: Template) -> float:
    return float(sum(len(piece.text) for piece in template if isinstance(piece, Literal)))
