"""Seeded mutants of text files, and a time limit, for tests that nothing but a MoezooError comes out."""

import contextlib
import copy
import json
import random
import signal
from collections.abc import Iterator
from typing import Any

TOKENS = [
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b":",
        b": ",
        b",",
        b"- ",
        b"\n",
        b"\n  ",
        b"\t",
        b'"',
        b"'",
        b"#",
        b"|",
        b">",
        b"%",
        b"@",
    ),
    *(
        b"&a ",
        b"*a",
        b"&a [*a, *a]",
        b"<<: *a",
        b"!!int ",
        b"!x ",
        b"? ",
        b"---",
        b"...",
        b"~",
        b"=",
        b"\\",
        b"\\ud800",
    ),
    *(b"null", b"true", b"yes", b"NaN", b"Infinity", b".inf", b"-1", b"0", b"0x_", b"1e999", b"2020-13-45", b"1:99"),
    *(
        b"9" * 30,
        b"9" * 5000,
        b"[" * 2000,
        b'{"a":' * 2000,
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\r\n",
    ),
]


def mutant(content: bytes, draw: random.Random) -> bytes:
    """Return the content with one to three changes: a token in, a piece out, doubled, moved, or a flipped bit."""
    result = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 3])):
        at = draw.randrange(len(result) + 1)
        size = draw.choice([1, 4, 40, 400])
        match draw.randrange(6):
            case 0 | 1:
                result[at:at] = draw.choice(TOKENS)
            case 2:
                result[at : at + size] = draw.choice(TOKENS)
            case 3:
                del result[at : at + size]
            case 4:
                result[at:at] = result[at : at + size] * draw.choice([1, 1, 50])
            case _ if at < len(result):
                result[at] ^= 1 << draw.randrange(8)
    return bytes(result)


ODD = [
    None,
    True,
    0,
    -1,
    3,
    2**31,
    2**63,
    10**90,
    1.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "0",
    "\0",
    "{{",
]
ODD += [
    [],
    [0],
    ["x"],
    [[]],
    {},
    {"x": 0},
    {"": {"": [{}]}},
    "a" * 100_000,
    [0] * 10_000,
    {"type": "x"},
    "(a+)+$",
    "../x",
]


def json_mutant(content: bytes, draw: random.Random) -> bytes:
    """Return the JSON text with one to three values replaced by odd ones, dropped, or moved to another place."""
    value = json.loads(content)
    for _ in range(draw.choice([1, 1, 2, 3])):
        places = list(_places(value))
        if places:
            container, key = draw.choice(places)
            other, another = draw.choice(places)
            match draw.randrange(6):
                case 0 if other is not container:
                    del container[key]
                case 1:
                    container[key] = copy.deepcopy(other[another])
                case _:
                    container[key] = copy.deepcopy(draw.choice(ODD))
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
