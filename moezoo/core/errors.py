"""Exceptions for errors that users can fix.

Each message is one line: what is wrong, what was received, what is expected, where, and what to do. The command line
prints `<class name>: <message>` and exits with status 1, without a traceback. Any other exception is a bug in moezoo:
the command line prints one line for it too, and writes its traceback to a file (cli/failures.py).
"""

import difflib
from collections.abc import Iterable
from numbers import Integral


class MoezooError(Exception):
    """Base class of all errors that the caller can cause and fix."""


class SpecError(MoezooError):
    """An invalid config or spec: unknown key, wrong type, impossible sizes."""


class DataError(MoezooError):
    """A text, shard, dataset or batch that is missing, damaged, too short, or incompatible with the model."""


class TokenizerError(MoezooError):
    """Text that a tokenizer cannot encode, or a tokenizer file that cannot be read."""


class CheckpointError(MoezooError):
    """A checkpoint that is missing, damaged, or does not match the spec."""


class RunError(MoezooError):
    """A run folder that is missing, not writable, or already exists."""


class BackendError(MoezooError):
    """A backend that is unknown or not installed."""


class PackageError(MoezooError):
    """An optional package that is not installed."""


class OutOfMemoryError(MoezooError):
    """A model, batch or sequence that needs more memory than there is."""


class BenchError(MoezooError):
    """A benchmark contender that crashed or does not support a case."""


class TrainingError(MoezooError):
    """Training that cannot continue, e.g. because the loss is not finite."""


def shown(value: object, limit: int = 100) -> str:
    """Return a value as one line for an error: its repr, cut after `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def shortened(path: object, limit: int = 200) -> str:
    """Return a path or name for an error: as it is, or only its ends if it has more than `limit` characters."""
    text = str(path)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `"; did you mean X?"` with the closest match for `word` in `known`; an empty string if none is close."""
    matches = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]}?" if matches else ""


def plural(word: str, number: int) -> str:
    """Return the word, with an s (`micro-batch`: es) unless the number is 1."""
    if number == 1:
        return word
    return f"{word}es" if word.endswith("ch") else f"{word}s"


def counted(number: int, word: str) -> str:
    """Return a number with what it counts: `1 token`, `1,024 tokens`."""
    return f"{number:,} {plural(word, number)}"


def check_count(name: str, given: object, least: int = 1) -> None:
    """Check that an argument is None or an integer of at least `least`. Raises SpecError."""
    if given is not None and (not isinstance(given, Integral) or isinstance(given, bool) or int(given) < least):
        raise SpecError(f"{name} is {given!r:.80}; expected an integer >= {least}.")
