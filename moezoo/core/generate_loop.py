"""The generate loop, written once: prefill, then one token at a time, sampled on the host."""

from collections.abc import Callable

import numpy as np

from moezoo.core.backend import Integers, Model, check_length
from moezoo.core.errors import DataError
from moezoo.core.sampling import SamplingOptions, sample


def generate(
    model: Model,
    tokens: Integers,
    *,
    max_new_tokens: int,
    options: SamplingOptions,
    end_of_text: int | None = None,
    on_tokens: Callable[[Integers], None] | None = None,
) -> Integers:
    """Continue B prompts of equal length.

    Args:
        model: a built model.
        tokens: int32 [B, T], T >= 1, 0 <= token < V.
        max_new_tokens: how many to add at most.
        options: greedy for temperature 0; a token depends on (seed, position, sequence) and the logits only.
        end_of_text: stop when every sequence has produced this token; what follows it in a sequence repeats it.
        on_tokens: called with each new column, int32 [B].

    Returns:
        int32 [B, new], new <= max_new_tokens.

    Raises DataError: an empty prompt, a token outside the vocabulary, more tokens than learned positions.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise DataError(f"a prompt needs at least one token; got shape {list(tokens.shape)}; expected [B, T], T >= 1.")
    if tokens.min() < 0 or tokens.max() >= model.spec.vocab:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(f"a prompt has token {worst}; expected 0 <= token < {model.spec.vocab}.")
    batch, length = tokens.shape
    check_length(model.spec, length + max_new_tokens, f"a prompt of {length} and {max_new_tokens} new ones")
    columns: list[Integers] = []
    ended = np.zeros(batch, bool)
    if max_new_tokens > 0:
        logits, cache = model.prefill(tokens, length + max_new_tokens)
    for index in range(max_new_tokens):
        column = sample(logits, options, length + index)
        if end_of_text is not None:
            column = np.where(ended, np.int32(end_of_text), column).astype(np.int32)
            ended |= column == end_of_text
        columns.append(column)
        if on_tokens is not None:
            on_tokens(column)
        if ended.all() or index + 1 == max_new_tokens:
            break
        logits, cache = model.decode(column, cache)
    return np.stack(columns, axis=1) if columns else np.zeros((batch, 0), np.int32)
