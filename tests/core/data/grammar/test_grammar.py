"""The grammar's exact entropy and surprisal against brute force, and properties of the built-in fables."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.data.grammar.grammar import Grammar, fair_mask, load_grammar, parse_grammar
from moezoo.core.data.grammar.parser import parse_grammar_file
from moezoo.core.data.grammar.pieces import Attribute, Choose, GrammarFile, Literal, Say, Template
from moezoo.core.errors import DataError, SpecError

# Has every feature: weights, nesting, variables, exclusion (with unequal weights), plain and branching attributes.
SMALL = r"""
end: "\n\n"
start: "The {hero=animal} met {other=animal-hero}{how}. {hero} {hero.end}, {other.his} {hero} too."
lists:
  animal:
    - {text: fox, weight: 3, his: his, end: "ran {how}"}
    - {text: frog, weight: 2, his: its, end: "sat"}
    - {text: hen, his: her, end: "{sound} at {other}"}
  how: [" by day", {text: " by night", weight: 2}, " late, {sound}"]
  sound: [croaking, {text: clucking, weight: 4}]
"""
FABLES = Path(__file__).parents[4] / "datasets" / "fables" / "grammar.yaml"


@pytest.fixture(scope="module")
def small() -> Grammar:
    return parse_grammar(SMALL)


@pytest.fixture(scope="module")
def every_document() -> dict[str, float]:
    return enumerate_documents(parse_grammar_file(SMALL))


@pytest.fixture(scope="module")
def fables() -> Grammar:
    return load_grammar(FABLES)


def enumerate_documents(file: GrammarFile) -> dict[str, float]:
    """Return every document with its probability by enumerating all choices: the reference implementation."""

    def expand(template: Template, chosen: Mapping[str, int]) -> Iterator[tuple[str, float, Mapping[str, int]]]:
        if not template:
            yield "", 1.0, chosen
            return
        for text, p, then in expand_piece(template[0], chosen):
            for rest, q, last in expand(template[1:], then):
                yield text + rest, p * q, last

    def expand_piece(piece: object, chosen: Mapping[str, int]) -> Iterator[tuple[str, float, Mapping[str, int]]]:
        match piece:
            case Literal():
                yield piece.text, 1.0, chosen
            case Say():
                yield from expand(file.lists[file.variables[piece.name]][chosen[piece.name]].template, chosen)
            case Attribute():
                option = file.lists[file.variables[piece.name]][chosen[piece.name]]
                yield from expand(option.attributes[piece.attribute], chosen)
            case Choose():
                options = file.lists[piece.source]
                allowed = [n for n in range(len(options)) if n not in [chosen[name] for name in piece.excluded]]
                total = sum(options[n].weight for n in allowed)
                for n in allowed:
                    then = {**chosen, piece.name: n} if piece.name else chosen
                    for text, p, last in expand(options[n].template, then):
                        yield text, p * options[n].weight / total, last

    documents: dict[str, float] = {}
    for text, p, _ in expand(file.start, {}):
        assert text not in documents, f"two derivations of {text!r}"
        documents[text + file.end] = p
    return documents


# --- entropy ---------------------------------------------------------------------------------------------------------


def test_entropy_equals_the_sum_over_all_documents(small: Grammar, every_document: dict[str, float]) -> None:
    assert math.isclose(sum(every_document.values()), 1.0, rel_tol=1e-12)
    entropy = small.entropy()
    nats = -sum(p * math.log(p) for p in every_document.values())
    characters = sum(p * len(text) for text, p in every_document.items())
    assert math.isclose(entropy.nats_per_document, nats, rel_tol=1e-12)
    assert math.isclose(entropy.characters_per_document, characters, rel_tol=1e-12)
    assert math.isclose(entropy.nats_per_character, nats / characters, rel_tol=1e-12)


def test_long_documents_do_not_exceed_the_recursion_limit() -> None:
    n = 3000
    grammar = parse_grammar('end: "|"\nstart: "' + "{bit}" * n + '"\nlists: {bit: ["0", "1"]}')
    entropy = grammar.entropy()
    assert math.isclose(entropy.nats_per_document, n * math.log(2), rel_tol=1e-12)
    assert entropy.characters_per_document == n + 1
    assert len(next(grammar.documents(seed=0))) == n + 1


def test_surprisal_of_a_document_is_its_negative_log_probability(
    small: Grammar, every_document: dict[str, float]
) -> None:
    for text, p in every_document.items():
        assert math.isclose(small.surprisal(text).sum(), -math.log(p), rel_tol=1e-12)


def test_surprisal_of_each_character_is_the_ratio_of_matching_masses(
    small: Grammar, every_document: dict[str, float]
) -> None:
    for text in itertools.islice(every_document, 0, None, 7):
        masses = [
            sum(p for other, p in every_document.items() if other.startswith(text[:n])) for n in range(len(text) + 1)
        ]
        expected = [math.log(before / after) for before, after in itertools.pairwise(masses)]
        np.testing.assert_allclose(small.surprisal(text), expected, atol=1e-12)


def test_surprisal_of_a_prefix_is_a_prefix_of_the_surprisal(small: Grammar) -> None:
    text = small.text(200, seed=5)
    whole = small.surprisal(text)
    for cut in range(len(text)):
        np.testing.assert_array_equal(small.surprisal(text[:cut]), whole[:cut])


def test_mean_surprisal_of_long_text_approaches_the_rate(small: Grammar, fables: Grammar) -> None:
    for grammar, tolerance in ((small, 0.01), (fables, 0.005)):  # at least 3 standard deviations of the mean
        text = grammar.text(200_000, seed=1)
        rate = grammar.entropy().nats_per_character
        assert abs(grammar.surprisal(text).mean() - rate) < tolerance * rate


def test_text_outside_the_grammar_error_names_the_position(small: Grammar) -> None:
    good = small.text(100, seed=0)
    at = good.index("met") + 1
    with pytest.raises(DataError, match=rf"cannot generate the text at position {at}; got 'X'.*expected 'e'"):
        small.surprisal(good[:at] + "X" + good[at + 1 :])
    with pytest.raises(DataError, match=r"position 4; got 'z' after 'The '; expected 'f' or 'h'"):
        small.surprisal("The zebra")
    with pytest.raises(DataError, match=r"position 13; got 'o'.*expected 'r'"):
        small.surprisal("The fox met fox")  # excluded: the hero


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_depends_only_on_the_seed_and_has_whole_documents(small: Grammar) -> None:
    text = small.text(1000, seed=3)
    assert text == parse_grammar(SMALL).text(1000, seed=3)
    assert text != small.text(1000, seed=4)
    assert small.text(500, seed=3) == text[: len(small.text(500, seed=3))]
    last = text[: -len(small.end)].rfind(small.end) + len(small.end)
    assert text.endswith(small.end)
    assert last < 1000 <= len(text)


def test_document_frequencies_match_their_probabilities(small: Grammar, every_document: dict[str, float]) -> None:
    n = 20_000
    drawn = list(itertools.islice(small.documents(seed=11), n))
    assert set(drawn) <= set(every_document)
    for text, p in every_document.items():
        assert abs(drawn.count(text) / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_text_of_no_characters_raises(small: Grammar) -> None:
    with pytest.raises(DataError, match="at least 1"):
        small.text(0, seed=0)


# --- boundaries and fair targets -------------------------------------------------------------------------------------


def test_starts_are_the_beginnings_of_documents(small: Grammar) -> None:
    documents = list(itertools.islice(small.documents(seed=2), 4))
    ends = np.cumsum([len(document) for document in documents])
    np.testing.assert_array_equal(small.starts("".join(documents)), ends)
    assert small.starts("The fox").size == 0


def test_fair_targets_follow_a_boundary_in_the_window(small: Grammar) -> None:
    document = next(small.documents(seed=0))
    window = document[-5:] + document[:9]
    expected = [False] * 4 + [True] * 10  # the input of position 4 is the marker's last character
    np.testing.assert_array_equal(small.fair_mask(window), expected)
    tokens = np.array([[ord(character) for character in text] for text in (window, document[:14])])
    np.testing.assert_array_equal(fair_mask(tokens, np.array([10, 10])), [expected, [False] * 14])
    assert not small.fair_mask("x").any()


def test_fair_surprisal_does_not_depend_on_text_before_the_window(small: Grammar) -> None:
    text = small.text(2000, seed=9)
    whole = small.surprisal(text)
    for begin in range(0, 300, 37):
        window = text[begin : begin + 241]
        best = small.fair_surprisal(window)
        mask = small.fair_mask(window[:-1])
        np.testing.assert_array_equal(~np.isnan(best), mask)
        np.testing.assert_array_equal(best[mask], whole[begin + 1 : begin + 241][mask])
    assert np.isnan(small.fair_surprisal("no boundary here")).all()
    assert small.fair_surprisal("").size == 0


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("frog", "foxy", r"lists.animal is ambiguous; got 'fox', a prefix of 'foxy'.*Reword"),
        ('" by day"', '""', "option that does not begin with literal text"),
        ('" by day"', '"{sound}"', "option that does not begin with literal text"),
        ("{how}. ", "{how}.\\n\\n", r"end marker '\\n\\n' may occur inside a document"),
        ("The {hero=", "\\n{hero=", r"end marker '\\n\\n' may occur inside a document"),
        ("too.", "too.\\n", r"end marker '\\n\\n' may occur inside a document"),
        ("{other.his}", "{others.his}", r"no variable is called 'others'; did you mean other\?"),
        ("The {hero=animal}", "{other} {hero=animal}", "'other' may be used before it is chosen"),
        ("{how}.", "{hwo}.", r"no list or variable is called 'hwo'; did you mean how\?"),
        ("{other=animal-hero}", "{other=how-hero}", "excludes 'hero', which is not chosen from 'how'"),
        ("{hero.end}", "{hero.ending}", r"no attribute 'ending'; did you mean end\?"),
        ("{hero.end}", "{hero.end", "unmatched brace"),
        ("{hero.end}", "{Hero!}", r"reference \{Hero!\}; expected"),
        (" late, {sound}", " late, {how}", "lists.how contains itself"),
        ("weight: 3", "weight: 0.5", r"lists.animal\[0\].weight is 0.5; expected a positive integer"),
        ("his: its, ", "", r"lists.animal\[1\] has the attributes \['end'\]"),
        ("croaking", "no", r"lists.sound\[0\].text is False; expected a text"),
        ("sound:", "how:", "duplicate key 'how'"),
        ("start:", "begin:", "begin is not a known key"),
        ("lists:", "lists:\n  spare: [a]", "lists.spare is never used"),
        ("text: fox,", 'text: "fox {sound}",', r"\{hero\} repeats an option that is not plain text"),
        ("{how}. ", "{sound=how}. ", "'sound' is both a list and a variable"),
        ("lists:", "lists: [", "is not valid YAML"),
    ],
)
def test_invalid_grammar_raises(old: str, new: str, message: str) -> None:
    assert old in SMALL
    with pytest.raises(SpecError, match=message):
        parse_grammar(SMALL.replace(old, new, 1))


def test_missing_grammar_file_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no such grammar; got .*none\.yaml"):
        load_grammar(tmp_path / "none.yaml")


# --- the fables ------------------------------------------------------------------------------------------------------


def test_fables_are_short_ascii_and_have_the_documented_entropy(fables: Grammar) -> None:
    entropy = fables.entropy()
    assert 0.44 < entropy.nats_per_character < 0.46  # the number in writings/exact_entropy.md
    assert fables.characters.isascii()
    assert len(fables.characters) <= 45
    documents = list(itertools.islice(fables.documents(seed=0), 300))
    assert set("".join(documents)) <= set(fables.characters)
    for document in documents:
        assert 150 <= len(document) <= 500
        assert document.splitlines()[-2].startswith("Moral: ")
        assert document.count("\n") == 3
