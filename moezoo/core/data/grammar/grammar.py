"""Probabilistic grammars: sampling text, parsing it, and its exact entropy and surprisal.

A document is generated from left to right, and the options of each choice begin with literals that are not prefixes
of each other. So the text so far determines every completed choice, and the remaining options of an open choice:

    -ln p(character | all before) = ln mass(options that match so far) - ln mass(options that also match it)

which is 0 wherever the next character is determined. Text is an infinite sequence of independent documents, each
followed by the end marker. parser.py has the file format; writings/exact_entropy.md the derivation and numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moezoo.core.config.yaml_file import read_text
from moezoo.core.data.grammar.entropy import Derivation, Expectation, Odds, choice_nats, literal_length
from moezoo.core.data.grammar.parser import parse_grammar_file
from moezoo.core.data.grammar.pieces import Attribute, Choose, GrammarFile, Literal, Say, Template
from moezoo.core.errors import DataError

_RAW_BLOCK = 4096  # 64-bit words drawn from Philox at a time


@dataclass(frozen=True)
class Entropy:
    """Entropy rate of the infinite sequence of independent documents: the lower bound of a model's loss.

    The rate is nats per document divided by characters per document, both exact expectations: by the renewal
    theorem, the limit of the mean surprisal per character.
    """

    nats_per_document: float
    characters_per_document: float

    @property
    def nats_per_character(self) -> float:
        """Entropy rate in nats: the lowest mean loss that any model can reach."""
        return self.nats_per_document / self.characters_per_document


def load_grammar(path: str | Path) -> "Grammar":
    """Read and validate a grammar file. Raises SpecError that names the violated rule."""
    text = read_text(Path(path), "grammar")
    return parse_grammar(text, where=str(path))


def parse_grammar(text: str, where: str = "grammar") -> "Grammar":
    """Parse and validate the text of a grammar; `where` names it in errors."""
    return Grammar(parse_grammar_file(text, where))


def fair_mask(tokens: NDArray[np.integer], end: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return a mask of the targets that follow a document boundary inside the window.

    Documents are independent, so for these targets the window contains all relevant context: the lowest possible
    loss given the window equals the lowest possible loss given the whole preceding text.

    Args:
        tokens: integer [..., T], the input tokens; the target of position t is token t + 1.
        end: integer [n], the end marker in the same tokens, one token per character.

    Returns:
        bool [..., T]: whether tokens 0 to t contain the complete marker.
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
    """A validated grammar, created by `load_grammar`."""

    def __init__(self, file: GrammarFile) -> None:
        self._file = file
        self._derivation = Derivation(file)

    @property
    def end(self) -> str:
        """End marker of a document; it occurs nowhere else in the text."""
        return self._file.end

    @cached_property
    def characters(self) -> str:
        """All characters that can occur in the text, sorted."""
        return "".join(sorted({character for text in _literals(self._file) for character in text} | set(self.end)))

    def text(self, characters: int, seed: int) -> str:
        """Return documents with at least `characters` characters in total; platform-independent for a given seed."""
        if characters < 1:
            raise DataError(f"cannot generate {characters} characters; expected at least 1. Use a larger number.")
        pieces: list[str] = []
        length = 0
        for document in self.documents(seed):
            pieces.append(document)
            length += len(document)
            if length >= characters:
                break
        return "".join(pieces)

    def documents(self, seed: int) -> Iterator[str]:
        """Yield independent documents forever, from raw Philox integers that are equal on every platform."""
        draws = _raw_draws(seed)
        while True:
            out: list[str] = []
            self._write(self._file.start, {}, out, draws)
            out.append(self.end)
            yield "".join(out)

    def entropy(self) -> Entropy:
        """Compute exact expectations over all documents by dynamic programming over the derivation, not sampling."""
        nats = Expectation(self._derivation, choice_nats, None).of_document()
        literal = Expectation(self._derivation, literal_length, None).of_document()
        # Expectations are additive, so the characters of each variable are counted separately: a state then has
        # the variables that affect the text and one more, not the product of all variables.
        repeats = [Expectation(self._derivation, None, name) for name in self._file.variables]
        characters = len(self.end) + literal + sum(part.of_document() for part in repeats)
        return Entropy(nats, characters)

    def surprisal(self, text: str) -> NDArray[np.float64]:
        """Return -ln p of each character given all preceding ones, for text that begins at a document's start.

        Args:
            text: any number of documents; the last may be incomplete.

        Returns:
            float64 [len(text)], nats; 0 wherever the character is determined.

        Raises:
            DataError: the grammar cannot generate the text; the message names the position.
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
        """Return the positions at which documents begin: those directly after an end marker.

        Position 0 is not included, since a window may begin inside a document; `len(text)` is included if the text
        ends with a marker.
        """
        found: list[int] = []
        at = text.find(self.end)
        while at >= 0:
            found.append(at + len(self.end))
            at = text.find(self.end, found[-1])
        return np.array(found, np.int64)

    def fair_mask(self, text: str) -> NDArray[np.bool_]:
        """Return `fair_mask` for the input characters of a model: bool [len(text)], by input position."""
        return fair_mask(_codes(text), _codes(self.end))

    def fair_surprisal(self, window: str) -> NDArray[np.float64]:
        """Return the exact surprisal of each target in `fair_mask`, NaN for the others.

        Args:
            window: T + 1 characters from any position in the text: the first T are the input, the last T the targets.

        Returns:
            float64 [T], nats; entry t is -ln p of character t + 1. Compare a model's loss with it per position: the
            mean over a window is *not* the entropy rate, as a window has more beginnings of documents than ends.

        Raises:
            DataError: the grammar cannot generate the text after the first boundary.
        """
        best = np.full(max(len(window) - 1, 0), np.nan)
        starts = self.starts(window)
        if len(starts) and starts[0] < len(window):
            best[starts[0] - 1 :] = self.surprisal(window[starts[0] :])
        return best

    # --- walking the derivation -----------------------------------------------------------------------------

    def _write(self, template: Template, chosen: dict[str, int], out: list[str], draws: Iterator[int]) -> None:
        for piece in template:
            match piece:
                case Literal():
                    out.append(piece.text)
                case Choose():
                    odds = self._derivation.odds(piece, chosen)
                    number = odds.draw(next(draws))
                    if piece.name is not None:
                        chosen[piece.name] = odds.numbers[number]
                    self._write(odds.options[number].template, chosen, out, draws)
                case Say():
                    self._write(self._derivation.option(piece.name, chosen).template, chosen, out, draws)
                case Attribute():
                    self._write(
                        self._derivation.option(piece.name, chosen).attributes[piece.attribute], chosen, out, draws
                    )

    def _read(self, template: Template, chosen: dict[str, int], reader: "_Reader") -> None:
        for piece in template:
            match piece:
                case Literal():
                    reader.literal(piece.text)
                case Choose():
                    odds = self._derivation.odds(piece, chosen)
                    number = reader.choice(odds)
                    if piece.name is not None:
                        chosen[piece.name] = odds.numbers[number]
                    after_opening = odds.options[number].template[1 if odds.openings[number] else 0 :]
                    self._read(after_opening, chosen, reader)
                case Say():
                    self._read(self._derivation.option(piece.name, chosen).template, chosen, reader)
                case Attribute():
                    self._read(self._derivation.option(piece.name, chosen).attributes[piece.attribute], chosen, reader)


class _TextEnds(Exception):
    """End of the text that is parsed."""


class _Reader:
    """Cursor over text that records the surprisal of each character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.nats = np.zeros(len(text))

    def literal(self, literal: str) -> None:
        if self.text.startswith(literal, self.position):
            self.position += len(literal)
            return
        self._follow([literal])

    def choice(self, odds: Odds) -> int:
        for number, opening in enumerate(odds.openings):
            if self.text.startswith(opening, self.position):
                self.nats[self.position : self.position + len(opening)] = odds.nats_of_opening[number]
                self.position += len(opening)
                return number
        number = self._follow(odds.openings)
        remaining = len(self.text) - self.position
        self.nats[self.position :] = odds.nats_of_opening[number][:remaining]
        raise _TextEnds

    def _follow(self, literals: list[str]) -> int:
        """Return a literal that begins with the rest of the text. Raises at the first character that matches none."""
        rest = self.text[self.position : self.position + max(map(len, literals))]
        candidates = list(range(len(literals)))
        for offset, character in enumerate(rest):
            matching = [n for n in candidates if offset < len(literals[n]) and literals[n][offset] == character]
            if not matching:
                at = self.position + offset
                expected = sorted({literals[n][offset] for n in candidates if offset < len(literals[n])})
                raise DataError(
                    f"the grammar cannot generate the text at position {at}; got {character!r} after "
                    f"{self.text[max(at - 20, 0) : at]!r}; expected {' or '.join(map(repr, expected))}. "
                    "Use text of this grammar that begins at the start of a document."
                )
            candidates = matching
        if len(literals) == 1:
            raise _TextEnds
        return candidates[0]


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
