"""Strict JSON parser for files that others wrote or that a crash may have damaged.

Python's own parser accepts duplicate keys, lone surrogates and any depth, which fail much later and far from the file.
"""

import json
import re
from collections import Counter
from typing import Any

_MAX_DEPTH = 100
_MAX_DIGITS = 100  # transformers writes 10**30 for an unlimited length; Python refuses to print 4,300 digits
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(content: bytes) -> Any:
    """Parse UTF-8 JSON of any type; `Infinity` and `NaN` are accepted, as Python writes them.

    Raises ValueError with a reason in a few words: not UTF-8, not JSON, a duplicate key, values nested deeper than 100,
    an integer of more than 100 digits, or half of a surrogate pair.
    """
    text = content.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_int=_integer)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair") from None
    return value


_TOO_DEEP = f"it is nested deeper than {_MAX_DEPTH}"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
    if level:
        raise ValueError(_TOO_DEEP)


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits; expected at most {_MAX_DIGITS}")
    return int(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} is a duplicate")
    return found
