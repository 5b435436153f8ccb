"""Arguments of `LoadedModel.generate`: prompts as texts or token ids, and settings of sampling."""

from collections.abc import Sequence
from typing import TypedDict, TypeVar

import numpy as np

from moezoo.core.backend import checked_tokens
from moezoo.core.data.tokenizers import IdsLike
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Integers

Text = TypeVar("Text", str, list[str])

TokenRows = Integers | Sequence[IdsLike]
"""Token ids of B prompts: int32 [B, T], or B rows of any lengths."""


class Sampling(TypedDict, total=False):
    """Settings of generation; each may be left out, or None.

    Fields:
        max_new_tokens: number of tokens to generate, at most.
        temperature: 0 is greedy.
        top_k: sample from the k most probable tokens.
        top_p: sample from the fewest tokens whose probabilities sum to p.
        min_p: drop tokens less probable than this fraction of the most probable one.
        repetition_penalty: on tokens that already occur; 1 is off.
        seed: of the random numbers.
        stop: a text that ends a sequence, or several; returned text ends before, ids with the token that completes one.
    """

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int
    stop: str | Sequence[str] | None


def checked_rows(spec: ModelSpec, tokens: TokenRows) -> list[Integers]:
    """Return prompts of token ids, of equal or of different lengths. Raises DataError: as `checked_tokens`."""
    try:
        return list(checked_tokens(spec, np.asarray(tokens), "tokens"))
    except ValueError:  # NumPy's, for rows of unequal length
        return [checked_tokens(spec, np.asarray(row)[None], "tokens")[0] for row in tokens]


def as_texts(prompts: list[str] | TokenRows) -> list[str] | None:
    """Return prompts that are texts; None if they are token ids."""
    is_text = isinstance(prompts, list | tuple) and len(prompts) > 0 and all(isinstance(row, str) for row in prompts)
    return [str(row) for row in prompts] if is_text else None
