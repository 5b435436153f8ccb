"""Seeded mutants of text files, and a time limit, for tests that nothing but a MoezooError comes out."""

import contextlib
import random
import signal
from collections.abc import Iterator

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
