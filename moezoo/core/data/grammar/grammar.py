"""Text whose entropy is known exactly: a weighted grammar that is drawn, read back, and summed over.

A document is written from left to right, and at each choice the options begin with literals of which none is
a prefix of another. So the text so far determines every choice that is complete, and of an open choice it
tells which options remain:

    -ln p(character | all before) = ln mass(options that fit so far) - ln mass(options that fit it too)

which is 0 wherever the text is determined. Text is an endless chain of independent documents, each closed by
the end marker. The file format is in `grammar_file`; the argument, and numbers, in writings/exact_entropy.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moezoo.core.config.yaml_file import read_text
from moezoo.core.data.grammar.entropy import Derivation, Expectation, Odds, choice_nats, literal_length
from moezoo.core.data.grammar.parser import Attribute, Choose, GrammarFile, Literal, Say, Template, parse_grammar_file
from moezoo.core.errors import DataError

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
        self._derivation = Derivation(file)

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
        nats = Expectation(self._derivation, choice_nats, None).of_document()
        literal = Expectation(self._derivation, literal_length, None).of_document()
        # Expectations add, so the characters of each remembered name are counted apart: a state then carries
        # the values that shape the text and one name, not the product of all of them.
        repeats = [Expectation(self._derivation, None, name) for name in self._file.variables]
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

    def choice(self, odds: Odds) -> int:
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
