"""Text whose entropy is known exactly: a weighted grammar that is drawn, read back, and summed over.

A document is written from left to right, and at each choice the options begin with literals of which none is
a prefix of another. So the text so far determines every choice that is complete, and of an open choice it
tells which options remain:

    -ln p(character | all before) = ln mass(options that fit what is before) - ln mass(options that fit it
    too)

which is 0 wherever the text is determined. Text is an endless chain of independent documents, each closed by
the end marker. The file format is in `grammar_file`; the argument, and numbers, in writings/exact_entropy.md.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import DataError
from moezoo.core.grammar_file import (
    Attribute,
    Choose,
    GrammarFile,
    Literal,
    Option,
    Piece,
    Say,
    Template,
    is_plain,
    parse_grammar_file,
    read_text,
)

_RAW_BLOCK = 4096  # draws of 64 bits taken from Philox at a time


@dataclass(frozen=True)
class Entropy:
    """What a character costs at best, in the endless chain of independent documents.

    The rate is nats per document over characters per document, both exact expectations: by the renewal
    theorem, the limit of the mean surprisal per character.
    """

    nats_per_document: float
    characters_per_document: float

    @property
    def nats_per_character(self) -> float:
        """The lowest mean loss that any model can reach."""
        return self.nats_per_document / self.characters_per_document

    @property
    def bits_per_character(self) -> float:
        """The same in bits."""
        return self.nats_per_character / math.log(2)


def load_grammar(path: str | Path) -> "Grammar":
    """Read and check a grammar file. Raises SpecError naming the rule that it breaks."""
    text = read_text(Path(path), "grammar")
    return parse_grammar(text, where=str(path))


def parse_grammar(text: str, where: str = "grammar") -> "Grammar":
    """`load_grammar` of a text; `where` names it in errors."""
    return Grammar(parse_grammar_file(text, where))


def fair_mask(tokens: NDArray[np.integer], end: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which targets follow a document boundary that the model has seen.

    Documents are independent, so for these targets the window holds all of the past that matters: the best
    loss given the window equals the best loss given everything before.

    Args:
        tokens: integer [..., T], what the model reads; the target of position t is the token after it, token
        t + 1. end: integer [n], the end marker in the same tokens, one token a character.

    Returns:
        bool [..., T]: whether the marker lies wholly within tokens 0 to t.
    """
    length, n = tokens.shape[-1], len(end)
    mask = np.zeros(tokens.shape, bool)
    if length < n:
        return mask
    closed = np.ones((*tokens.shape[:-1], length - n + 1), bool)
    for offset in range(n):
        closed &= tokens[..., offset : length - n + 1 + offset] == end[offset]
    mask[..., n - 1 :] = np.logical_or.accumulate(closed, axis=-1)
    return mask


class Grammar:
    """A checked grammar. Made by `load_grammar`."""

    def __init__(self, file: GrammarFile) -> None:
        self._file = file
        self._known_odds: dict[tuple[str, frozenset[int]], _Odds] = {}

    @property
    def end(self) -> str:
        """The marker that closes a document, and stands nowhere else."""
        return self._file.end

    @cached_property
    def characters(self) -> str:
        """Every character that the text may hold, sorted."""
        return "".join(sorted({character for text in _literals(self._file) for character in text} | set(self.end)))

    def text(self, characters: int, seed: int) -> str:
        """Documents until there are `characters` characters or more. A seed gives the same text everywhere."""
        if characters < 1:
            raise DataError(f"text of {characters} characters cannot be; expected at least 1. Ask for more.")
        pieces: list[str] = []
        length = 0
        for document in self.documents(seed):
            pieces.append(document)
            length += len(document)
            if length >= characters:
                break
        return "".join(pieces)

    def documents(self, seed: int) -> Iterator[str]:
        """Independent documents, without end. Integers from raw Philox draws: equal on every platform."""
        draws = _raw_draws(seed)
        while True:
            out: list[str] = []
            self._write(self._file.start, {}, out, draws)
            out.append(self.end)
            yield "".join(out)

    def entropy(self) -> Entropy:
        """Exact expectations over all documents, by dynamic programming over the derivation; no sampling."""
        nats = _Expectation(self, _choice_nats, None).of_document()
        literal = _Expectation(self, _literal_length, None).of_document()
        # Expectations add, so the characters of each remembered name are counted apart: a state then carries
        # the values that shape the text and one name, not the product of all of them.
        repeats = [_Expectation(self, None, name) for name in self._file.variables]
        characters = len(self.end) + literal + sum(part.of_document() for part in repeats)
        return Entropy(nats, characters)

    def surprisal(self, text: str) -> NDArray[np.float64]:
        """-ln p of each character given all before it, for text that begins at the start of a document.

        Args:
            text: any number of documents; the last may be cut anywhere.

        Returns:
            float64 [len(text)], nats; 0 wherever the character is determined.

        Raises:
            DataError: the text leaves the grammar; the message names the position.
        """
        reader = _Reader(text)
        try:
            while reader.position < len(text):
                self._read(self._file.start, {}, reader)
                reader.literal(self.end)
        except _TextEnds:
            pass
        return reader.nats

    def starts(self, text: str) -> NDArray[np.int64]:
        """Positions at which a document begins, as the text itself shows: just after each end marker.

        Position 0 is not among them (a window may begin anywhere); `len(text)` is, where the text ends with a
        marker.
        """
        found: list[int] = []
        at = text.find(self.end)
        while at >= 0:
            found.append(at + len(self.end))
            at = text.find(self.end, found[-1])
        return np.array(found, np.int64)

    def fair_mask(self, text: str) -> NDArray[np.bool_]:
        """`fair_mask` of the characters that a model reads: bool [len(text)], by position of the input."""
        return fair_mask(_codes(text), _codes(self.end))

    def fair_surprisal(self, window: str) -> NDArray[np.float64]:
        """The exact surprisal of each target that `fair_mask` admits, NaN for the others.

        Args:
            window: T + 1 characters from anywhere in the text: the model reads the first T and predicts the
            last T.

        Returns:
            float64 [T], nats; entry t is -ln p of character t + 1. Compare a model's loss with it position by
            position: the mean over a window is *not* the entropy rate, as a window shows more beginnings of
            documents than ends.

        Raises:
            DataError: the text after the first boundary leaves the grammar.
        """
        best = np.full(max(len(window) - 1, 0), np.nan)
        starts = self.starts(window)
        if len(starts) and starts[0] < len(window):
            best[starts[0] - 1 :] = self.surprisal(window[starts[0] :])
        return best

    # --- walking the derivation -----------------------------------------------------------------------------

    def odds(self, piece: Choose, chosen: Mapping[str, int]) -> "_Odds":
        """The options that a choice has, given what was chosen before."""
        excluded = frozenset(chosen[name] for name in piece.excluded)
        key = (piece.source, excluded)
        found = self._known_odds.get(key)
        if found is None:
            found = self._known_odds[key] = _Odds(self._file.lists[piece.source], excluded)
        return found

    def option(self, name: str, chosen: Mapping[str, int]) -> Option:
        """The option that is remembered under a name."""
        return self._file.lists[self._file.variables[name]][chosen[name]]

    def _write(self, template: Template, chosen: dict[str, int], out: list[str], draws: Iterator[int]) -> None:
        for piece in template:
            match piece:
                case Literal():
                    out.append(piece.text)
                case Choose():
                    odds = self.odds(piece, chosen)
                    number = odds.draw(next(draws))
                    if piece.name is not None:
                        chosen[piece.name] = odds.numbers[number]
                    self._write(odds.options[number].template, chosen, out, draws)
                case Say():
                    self._write(self.option(piece.name, chosen).template, chosen, out, draws)
                case Attribute():
                    self._write(self.option(piece.name, chosen).attributes[piece.attribute], chosen, out, draws)

    def _read(self, template: Template, chosen: dict[str, int], reader: "_Reader") -> None:
        for piece in template:
            match piece:
                case Literal():
                    reader.literal(piece.text)
                case Choose():
                    odds = self.odds(piece, chosen)
                    number = reader.choice(odds)
                    if piece.name is not None:
                        chosen[piece.name] = odds.numbers[number]
                    after_opening = odds.options[number].template[1 if odds.openings[number] else 0 :]
                    self._read(after_opening, chosen, reader)
                case Say():
                    self._read(self.option(piece.name, chosen).template, chosen, reader)
                case Attribute():
                    self._read(self.option(piece.name, chosen).attributes[piece.attribute], chosen, reader)


class _Odds:
    """The options of one choice, those excluded left out and the weights of the others renormalised."""

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
        """An option by its weight, from 64 random bits; the bias is below total / 2**64."""
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


class _TextEnds(Exception):
    """The text that is read ends here."""


class _Reader:
    """A cursor over text that writes down what each character cost."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.nats = np.zeros(len(text))

    def literal(self, literal: str) -> None:
        if self.text.startswith(literal, self.position):
            self.position += len(literal)
            return
        self._follow([literal])

    def choice(self, odds: _Odds) -> int:
        for number, opening in enumerate(odds.openings):
            if self.text.startswith(opening, self.position):
                self.nats[self.position : self.position + len(opening)] = odds.nats_of_opening[number]
                self.position += len(opening)
                return number
        number = self._follow(odds.openings)
        cut = len(self.text) - self.position
        self.nats[self.position :] = odds.nats_of_opening[number][:cut]
        raise _TextEnds

    def _follow(self, literals: list[str]) -> int:
        """One of the literals that the rest of the text begins. Raises at the first character that fits none."""
        rest = self.text[self.position : self.position + max(map(len, literals))]
        open_ = list(range(len(literals)))
        for offset, character in enumerate(rest):
            fitting = [n for n in open_ if offset < len(literals[n]) and literals[n][offset] == character]
            if not fitting:
                at = self.position + offset
                expected = sorted({literals[n][offset] for n in open_ if offset < len(literals[n])})
                raise DataError(
                    f"text leaves the grammar at position {at}; got {character!r} after "
                    f"{self.text[max(at - 20, 0) : at]!r}; "
                    f"expected {' or '.join(map(repr, expected))}. Give text of this grammar that begins at "
                    f"a document's start."
                )
            open_ = fitting
        if len(literals) == 1:
            raise _TextEnds
        return open_[0]


class _Expectation:
    """The expected sum, over a document, of a value per piece, by dynamic programming over what is left of it.

    With `watched`, the value is the length of what repeats that name; else it is `value(piece, odds)`. Names
    are forgotten as soon as nothing that is left depends on them: lengths of plain repeats do not, exclusions
    and branching attributes do.
    """

    def __init__(
        self, grammar: Grammar, value: Callable[[Piece, _Odds | None], float] | None, watched: str | None
    ) -> None:
        self.grammar = grammar
        self.value = value
        self.watched = watched
        self.memo: dict[tuple[int, tuple[tuple[str, int], ...]], float] = {}
        self.rests: dict[tuple[int, int, int], int] = {}
        self.kept: list[tuple[Template, int, int]] = []
        self.needed: list[frozenset[str]] = []

    def of_document(self) -> float:
        """The sum, expected over all documents; the end marker is not counted."""
        return self._sum(self._rest(self.grammar._file.start, 0, -1), {})

    def _rest(self, template: Template, index: int, after: int) -> int:
        """A number for `template[index:]` followed by the rest `after`; -1 is nothing."""
        if index == len(template):
            return after
        key = (id(template), index, after)  # the grammar keeps its templates, so an id stays theirs
        number = self.rests.get(key)
        if number is None:
            number = self.rests[key] = len(self.kept)
            self.kept.append((template, index, after))
            later = self.needed[after] if after >= 0 else frozenset()
            self.needed.append(self._reads(template[index:]) | later)
        return number

    def _reads(self, template: Template) -> frozenset[str]:
        """The names on which the sum over a template depends."""
        names: set[str] = set()
        for piece in template:
            match piece:
                case Choose():
                    names.update(piece.excluded)
                    for option in self.grammar._file.lists[piece.source]:
                        names |= self._reads(option.template)
                case Say() if piece.name == self.watched:
                    names.add(piece.name)
                case Attribute():
                    branches = self._attribute(piece)
                    if piece.name == self.watched or not all(map(is_plain, branches)):
                        names.add(piece.name)
                    for branch in branches:
                        names |= self._reads(branch)
                case _:
                    pass
        return frozenset(names)

    def _attribute(self, piece: Attribute) -> list[Template]:
        source = self.grammar._file.variables[piece.name]
        return [option.attributes[piece.attribute] for option in self.grammar._file.lists[source]]

    def _sum(self, rest: int, chosen: Mapping[str, int]) -> float:
        if rest < 0:
            return 0.0
        needed = self.needed[rest]
        chosen = {name: number for name, number in chosen.items() if name in needed}
        key = (rest, tuple(sorted(chosen.items())))
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = self._step(rest, chosen)
        return found

    def _step(self, rest: int, chosen: Mapping[str, int]) -> float:
        template, index, after = self.kept[rest]
        piece = template[index]
        following = self._rest(template, index + 1, after)
        match piece:
            case Literal():
                return self._own(piece, None) + self._sum(following, chosen)
            case Choose():
                odds = self.grammar.odds(piece, chosen)
                total = self._own(piece, odds)
                for p, option, number in zip(odds.probability, odds.options, odds.numbers, strict=True):
                    then = {**chosen, piece.name: number} if piece.name is not None else chosen
                    total += p * self._sum(self._rest(option.template, 0, following), then)
                return total
            case Say():
                said = self.grammar.option(piece.name, chosen).template if piece.name == self.watched else ()
                return _plain_length(said) + self._sum(following, chosen)
            case Attribute():
                if piece.name not in chosen:  # plain, and not watched: its length is counted where it is
                    return self._sum(following, chosen)
                branch = self.grammar.option(piece.name, chosen).attributes[piece.attribute]
                if all(map(is_plain, self._attribute(piece))):
                    own = _plain_length(branch) if piece.name == self.watched else 0.0
                    return own + self._sum(following, chosen)
                return self._sum(self._rest(branch, 0, following), chosen)

    def _own(self, piece: Piece, odds: _Odds | None) -> float:
        return self.value(piece, odds) if self.value else 0.0


def _choice_nats(piece: Piece, odds: _Odds | None) -> float:
    return odds.nats if odds else 0.0


def _literal_length(piece: Piece, odds: _Odds | None) -> float:
    return float(len(piece.text)) if isinstance(piece, Literal) else 0.0


def _plain_length(template: Template) -> float:
    return float(sum(len(piece.text) for piece in template if isinstance(piece, Literal)))


def _raw_draws(seed: int) -> Iterator[int]:
    bits = np.random.Philox(key=seed)
    while True:
        yield from bits.random_raw(_RAW_BLOCK).tolist()


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))


def _literals(file: GrammarFile) -> Iterator[str]:
    templates = [file.start]
    for options in file.lists.values():
        for option in options:
            templates += [option.template, *option.attributes.values()]
    for template in templates:
        yield from (piece.text for piece in template if isinstance(piece, Literal))
