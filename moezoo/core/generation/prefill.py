"""How prompts are handed to a model: padded on the left to one width, in pieces, into caches that grow.

Padding stands before a row's first token, so that all rows of a batch write the same slots of their caches and end
together, whatever their lengths are.
"""

from collections.abc import Sequence

import numpy as np

from moezoo.core.tokens import Integers

PIECE = 256
"""Tokens of a prompt at a time, so that scores are PIECE x S a head and not T x T. A product of so many rows is
bound by arithmetic rather than by the weights that it reads; other sizes have not been timed."""

INITIAL_CAPACITY = 256
"""Slots of a new cache: about a paragraph, within which nothing is recompiled; other sizes were not timed."""


def widths(length: int, smallest: int = 1) -> list[int]:
    """The widths of the pieces of a prompt: whole ones, before them the rest, padded to a power of two from `smallest`.

    `smallest` 1: not padded. They add up to `length` or more.
    """
    whole, rest = divmod(length, PIECE)
    if rest and smallest > 1:
        rest = max(smallest, 1 << (rest - 1).bit_length())
    return ([rest] if rest else []) + [PIECE] * whole


def padded(prompts: Sequence[Integers], width: int) -> tuple[Integers, Integers]:
    """Tokens int32 [B, width], each row at the right end, and the place int32 [B] of its first token."""
    tokens = np.zeros((len(prompts), width), np.int32)
    first = np.array([width - len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, first[row] :] = prompt
    return tokens, first


def seen_tokens(prompts: Sequence[Integers], vocab: int) -> np.ndarray:
    """Which tokens each prompt has: bool [B, V]."""
    seen = np.zeros((len(prompts), vocab), np.bool_)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen
