"""Errors that a person can act on.

Each is one line: what is wrong, what was received, what is expected, where, and what to do. The command line prints
`<class name>: <message>` and exits with status 1, without a traceback; anything else that escapes is a bug of ours.
"""

import difflib
from collections.abc import Iterable


class MoezooError(Exception):
    """Base of every error that the caller can cause and mend."""


class SpecError(MoezooError):
    """A config or spec that cannot be: unknown key, wrong type, impossible sizes."""


class DataError(MoezooError):
    """A text, shard, dataset or batch that is missing, damaged, too short, or does not fit the model."""


class TokenizerError(MoezooError):
    """Text that a tokenizer cannot encode, or a tokenizer file that cannot be read."""


class CheckpointError(MoezooError):
    """A checkpoint that is missing, damaged, or does not fit the spec."""


class RunError(MoezooError):
    """A run folder that is missing, in the way, or not writable."""


class BackendError(MoezooError):
    """A backend that is unknown or not installed."""


class BenchError(MoezooError):
    """A contender of the benchmark that died, or cannot do what it is asked to."""


class TrainingError(MoezooError):
    """Training that cannot go on, for example a loss that is not finite."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"` for the known word nearest to `word`, or an empty string where none is near."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
