"""Caches of one generation that another one starts with."""

from collections.abc import Collection
from typing import Any, NamedTuple


class Reuse(NamedTuple):
    """Caches to start a generation of one prompt with, and places in it for a later one to start from.

    Fields:
        before: a generation of the same model to continue, which cannot be used any more; None: none.
        shared: number of tokens that the prompt begins with and that are not read again, 0 < shared < T. See
            `Generation.reusable`: any that the caches hold; with recurrent states or windows the last one, and those
            after which they were kept.
        keep: numbers of the prompt's first tokens after which states are kept.
    """

    before: Any = None
    shared: int = 0
    keep: Collection[int] = ()


NO_REUSE = Reuse()
"""Start with empty caches and keep no states."""
