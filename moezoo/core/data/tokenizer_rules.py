"""Check of a tokenizer's rules in a child process with limits.

A tokenizer.json can have a regular expression that takes exponential time, which ends in a panic of the tokenizers
library, and replacements that make gigabytes of one word. The rules are tried there without the vocabulary, on runs of
each kind of character and on every string that they mention.
"""

import contextlib
import functools
import json
import re
import string
from collections.abc import Iterator
from typing import Any

from moezoo.core.errors import TokenizerError
from moezoo.core.limited_process import LimitedProcess, LimitedProcessError

PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
_MAX_GROWTH = 100  # of bytes: the longest decomposition in Unicode (NFKD) has 18 characters
_WITHOUT_BOUNDS = ('"Regex"', '"Replace"', '"precompiled_charsmap"')  # other rules take linear time and space
_MEMORY_BYTES = 1 << 28
_RUN = 2000
_KINDS = ("a", "A", "1", " ", "\n", "\t", "é", "犬", "🙂", "_", "-", ".", "'", "<", "▁")


def check_rules(backend: Any, where: str) -> None:
    """Try the rules of a `tokenizers.Tokenizer`. Raises TokenizerError if they are without bounds."""
    rules = json.dumps({name: _json_of(getattr(backend, name)) for name in PARTS})
    if not any(word in rules for word in _WITHOUT_BOUNDS) and rules.count('"Sequence": {') <= 3:  # A; A and B of a pair
        return
    try:
        _try_in_child(rules)
    except LimitedProcessError as error:
        # Rust code aborts when it gets no memory.
        reason = str(error).replace("its process ended with SIGABRT", f"they need more than {_MEMORY_BYTES >> 20} MiB")
        raise TokenizerError(
            f"the rules of the tokenizer have no bounds; got {reason:.200} ({where}); expected a normalizer and a "
            "pre-tokenizer of bounded time and size. Use the tokenizer.json that was published with the model."
        ) from None


@functools.cache
def _try_in_child(rules: str) -> None:
    process = LimitedProcess("moezoo.core.data.tokenizer_rules:try_rules", seconds=3.0, memory_bytes=_MEMORY_BYTES)
    process.call(json.loads(rules))


@contextlib.contextmanager
def library_errors(doing: str, where: str) -> Iterator[None]:
    """Convert what the tokenizers library raises into a TokenizerError: errors, and panics, which are no Exception."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(
                f"the tokenizer cannot {doing}; got {first_line(error):.200} ({where}). Use the tokenizer.json that "
                "was published with the model, or other text."
            ) from None
        raise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300].rstrip(".")


def _json_of(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


# --- in the child ----------------------------------------------------------------------------------------------------


def try_rules(rules: dict[str, Any]) -> None:
    """Encode and decode texts by rules without a vocabulary, in this process. Raises ValueError: texts grow."""
    from tokenizers import Tokenizer

    nothing = {"type": "BPE", "vocab": {"<unk>": 0, "x": 1}, "merges": [], "unk_token": "<unk>"}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "model": nothing, **rules}
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    strings = sorted(set(_strings(rules)))
    words = sorted({word for text in strings for word in re.findall(r"\w+", text)})
    # The end lets no run match to its end, and has what a regular expression may look for before it tries.
    end = "\x01" + string.punctuation + " ".join(words)[:_RUN]
    for text in [*((run * _RUN)[:_RUN] + end for run in (*_KINDS, *strings, *words)), "".join(_KINDS) * 20]:
        normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        _check_growth("normalizer", text, normal)
        ids = tokenizer.encode(text).ids
        if len(ids) > _MAX_GROWTH * (len(text.encode()) + 1):
            raise ValueError(f"{len(text)} characters become {len(ids)} tokens")
        if tokenizer.decoder is not None:
            _check_growth("decoder", text, tokenizer.decoder.decode([text]))


def _check_growth(part: str, text: str, result: str) -> None:
    if len(result.encode()) > _MAX_GROWTH * len(text.encode()):
        raise ValueError(f"its {part} makes {len(result)} characters of {len(text)}")


def _strings(value: Any) -> list[str]:
    """Return the strings in the rules: patterns, replacements and prefixes are among them."""
    if isinstance(value, str):
        return [value[:_RUN]] if value else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _strings(each)]
