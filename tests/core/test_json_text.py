import math

import pytest

from moezoo.core.json_text import parse_json


def test_json_of_other_programs_is_parsed():
    text = '{"a": [1.5, Infinity, NaN], "long": 1000000000000000019884624838656, "ä": "\\ud83d\\ude00"}'
    value = parse_json(text.encode())
    assert value["a"][:2] == [1.5, math.inf]
    assert value["long"] == int(1e30)
    assert value["ä"] == "\U0001f600"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff{}", "can't decode byte 0xff in position 0"),
        (b"", "Expecting value"),
        (b"{}\x00", "Extra data"),
        (b'{"a": 1, "a": 2}', "the key 'a' is a duplicate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it has an integer of 5000 digits; expected at most 100"),
        (b"[" * 100_000 + b"]" * 100_000, "it is nested deeper than 100"),
        (b'{"a":' * 150 + b"1" + b"}" * 150, "it is nested deeper than 100"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_damage_is_a_reason_of_a_few_words(content, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(content)
    assert len(str(caught.value)) < 200
