"""Chunked prefill: prompts of a batch are left-padded to equal length and processed in chunks into growing KV caches.

With padding on the left, all rows of a batch write the same cache slots and end at the same position, whatever their
lengths.
"""

from collections.abc import Sequence

import numpy as np

from moezoo.core.tokens import Integers

CHUNK = 256
"""Tokens per prefill chunk, so that attention scores are CHUNK x S per head, not T x T. A matrix product of this many
rows is bound by compute rather than by reading weights. Other sizes were not timed."""

INITIAL_CAPACITY = 256
"""Capacity of a new cache in tokens: a paragraph of text fits without recompilation. Other sizes were not timed."""


def widths(length: int, smallest: int = 1) -> list[int]:
    """Return the chunk widths for a prompt: the remainder first, then full chunks of CHUNK tokens.

    The remainder is rounded up to a power of two of at least `smallest`; with `smallest` 1 it is not rounded. The sum
    is at least `length`.
    """
    whole, rest = divmod(length, CHUNK)
    if rest and smallest > 1:
        rest = max(smallest, 1 << (rest - 1).bit_length())
    return ([rest] if rest else []) + [CHUNK] * whole


def widths_after(length: int, smallest: int = 1) -> list[int]:
    """Return the widths of pieces that continue a sequence: their sum is `length`, since none can be padded.

    With `smallest` above 1, few widths compile: full chunks, then powers of two.
    """
    if smallest == 1:
        return widths(length)
    whole, rest = divmod(length, CHUNK)
    return [CHUNK] * whole + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def padded(prompts: Sequence[Integers], width: int) -> tuple[Integers, Integers]:
    """Left-pad prompts: return tokens int32 [B, width] and the position int32 [B] of each row's first token."""
    tokens = np.zeros((len(prompts), width), np.int32)
    first = np.array([width - len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, first[row] :] = prompt
    return tokens, first


def seen_tokens(prompts: Sequence[Integers], vocab: int) -> np.ndarray:
    """Return the tokens that occur in each prompt as a mask: bool [B, V]; for the repetition penalty."""
    seen = np.zeros((len(prompts), vocab), np.bool_)
    for row, prompt in enumerate(prompts):
        seen[row, prompt[prompt < vocab]] = True  # a token without a logit cannot occur again
    return seen
