"""Stop strings: the text before the first of them, however a stream is cut; across tokens and characters."""

import itertools

import numpy as np
import pytest

from moezoo.core.data.tokenizers import ByteTokenizer
from moezoo.core.errors import SpecError
from moezoo.core.generation.loop import Continuation, until_stop
from moezoo.core.generation.stop_strings import StopStrings


def before(stops, pieces):
    stop = StopStrings(stops)
    return [stop.add(piece) for piece in pieces] + [stop.finish()], stop.found


def test_text_that_may_begin_a_stop_string_is_held_back():
    assert before(["END"], ["a E", "N", "x", "EN", "D b"]) == (["a ", "", "ENx", "", "", ""], "END")
    assert before(["END"], ["a EN"]) == (["a ", "EN"], None)
    assert before(["aab"], ["aa", "ab", "c"]) == (["", "a", "", ""], "aab")  # it begins inside its own beginning
    assert before([], ["a", "b"]) == (["a", "b", ""], None)
    with pytest.raises(SpecError, match="a stop string is empty"):
        StopStrings(["a", ""])
    with pytest.raises(SpecError, match=r"stop is \[5\]; expected a text, or a list of texts"):
        StopStrings([5])
    one = StopStrings("ab")
    assert (one.add("a b ab"), one.found) == ("a b ", "ab")


def test_the_result_does_not_depend_on_how_a_stream_is_cut():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("abé"), 12))
        stops = ["".join(rng.choice(list("abé"), length)) for length in (2, 3, 4)]
        cuts = sorted({0, 12, *rng.integers(0, 12, 4).tolist()})
        pieces, found = before(stops, [text[a:b] for a, b in itertools.pairwise(cuts)])
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        expected = text if not ends else text[: min(text.find(s) for s in stops if text[: min(ends)].endswith(s))]
        assert "".join(pieces) == expected
        assert (found is None) == (not ends)


def test_a_stop_string_across_tokens_inside_characters_ends_a_sequence():
    tokens = list("two é! three".encode())
    continuations = [Continuation(ByteTokenizer(), [], (), stop) for stop in (["é!"], ["hr"], [])]
    add = until_stop(continuations)
    ended = [add(np.full(3, token, np.int32)) for token in tokens]
    assert [row.index(True) if True in row else None for row in zip(*ended, strict=True)] == [6, 10, None]
    assert [each.ended_by for each in continuations] == ["stop", "stop", "length"]
    assert continuations[0].tokens == tokens[:7]
    streamed = Continuation(ByteTokenizer(), [], (), ["é!"])
    assert [streamed.add(token) for token in tokens] == [*"two ", *[""] * 9]
    assert streamed.finish() == ""
