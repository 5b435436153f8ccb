"""The generate loop, written once: prefill, then one token at a time, sampled on the host."""

from collections.abc import Callable, Collection

import numpy as np

from moezoo.core.backend import Integers, Model, check_length
from moezoo.core.errors import DataError
from moezoo.core.sampling import SamplingOptions, penalized, sample
from moezoo.core.tokenizer import IdsLike, StreamDecoder, Tokenizer


def generate(
    model: Model,
    tokens: Integers,
    *,
    max_new_tokens: int,
    options: SamplingOptions,
    end_tokens: Collection[int] = (),
    padding: int | None = None,
    on_tokens: Callable[[Integers], None] | None = None,
) -> Integers:
    """Continue B prompts of equal length.

    Args:
        model: a built model.
        tokens: int32 [B, T], T >= 1, 0 <= token < V.
        max_new_tokens: how many to add at most.
        options: greedy for temperature 0; a token depends on (seed, position, sequence) and the logits only.
        end_tokens: stop when every sequence has produced one of these.
        padding: what follows the end of a sequence while others go on; None: its end token again.
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
    if padding is not None and not 0 <= padding < model.spec.vocab:
        padding = None  # files name padding that their model has no row for; it would be read as one
    columns: list[Integers] = []
    ended = np.zeros(batch, bool)
    if max_new_tokens > 0:
        logits, cache = model.prefill(tokens, length + max_new_tokens)
    for index in range(max_new_tokens):
        if options.repetition_penalty != 1:
            before = np.concatenate([tokens, *(column[:, None] for column in columns)], axis=1)
            logits = penalized(logits, before, options.repetition_penalty)
        column = sample(logits, options, length + index)
        if ended.any():
            column = np.where(ended, columns[-1] if padding is None else np.int32(padding), column).astype(np.int32)
        ended |= np.isin(column, list(end_tokens))
        columns.append(column)
        if on_tokens is not None:
            on_tokens(column)
        if ended.all() or index + 1 == max_new_tokens:
            break
        logits, cache = model.decode(column, cache)
    return np.stack(columns, axis=1) if columns else np.zeros((batch, 0), np.int32)


class Continuation:
    """What one sequence says, piece by piece, up to the token that ends it; without a tokenizer, `,17` for token 17.

    >>> said = Continuation(tokenizer, prompt_ids, model.generation.end_tokens)
    >>> pieces = [said.add(token) for token in new] + [said.finish()]
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: IdsLike, end_tokens: Collection[int]) -> None:
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        if self._decoder is not None:
            self._decoder.add(prompt)  # Trap: some tokenizers write a word without its space where it comes first
        self._end_tokens, self._ended = end_tokens, False

    def add(self, token: int) -> str:
        """The text that this token completes; empty from the end on."""
        self._ended = self._ended or token in self._end_tokens
        if self._ended:
            return ""
        return f",{token}" if self._decoder is None else self._decoder.add([token])

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        return "" if self._decoder is None else self._decoder.finish()
