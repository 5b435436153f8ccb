"""The generate loop, written once: a token is computed while the one before is fetched, decoded and shown."""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from moezoo.core.backend import Model, check_length
from moezoo.core.data.tokenizers import IdsLike, StreamDecoder, Tokenizer
from moezoo.core.errors import DataError
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.tokens import Integers


def generate(
    model: Model,
    prompts: Integers | Sequence[IdsLike],
    *,
    max_new_tokens: int,
    options: SamplingOptions,
    end_tokens: Collection[int] = (),
    padding: int | None = None,
    on_tokens: Callable[[Integers], None] | None = None,
) -> Integers:
    """Continue B prompts, each as if it were alone, but for its number in the draws.

    Args:
        model: a built model.
        prompts: int32 [B, T], or B prompts of any lengths; T >= 1, 0 <= token < V.
        max_new_tokens: how many to add at most.
        options: greedy for temperature 0; a token depends on (seed, position, sequence) and the logits only.
        end_tokens: stop when every sequence has produced one of these.
        padding: what follows the end of a sequence while others go on; None: its end token again.
        on_tokens: called with each new column, int32 [B].

    Returns:
        int32 [B, new], new <= max_new_tokens.

    Raises DataError: an empty prompt, a token outside the vocabulary, more tokens than learned positions, logits from
    which nothing can be drawn.
    """
    rows = checked_prompts(model, prompts, max_new_tokens)
    if padding is not None and not 0 <= padding < model.spec.vocab:
        padding = None  # files name padding that their model has no row for; it would be read as one
    columns: list[Integers] = []
    ended = np.zeros(len(rows), bool)
    if max_new_tokens <= 0:
        return np.zeros((len(rows), 0), np.int32)
    generation = model.start_generation(rows, max_new_tokens, options)
    pending = generation.next()
    for index in range(max_new_tokens):
        following = generation.next() if index + 1 < max_new_tokens else pending
        column, pending = pending.fetch(), following
        if ended.any():
            column = np.where(ended, columns[-1] if padding is None else np.int32(padding), column).astype(np.int32)
        ended |= np.isin(column, list(end_tokens))
        columns.append(column)
        if on_tokens is not None:
            on_tokens(column)
        if ended.all():
            break
    return np.stack(columns, axis=1)


def checked_prompts(model: Model, prompts: Integers | Sequence[IdsLike], new_tokens: int) -> list[Integers]:
    """The prompts as int32 rows. Raises DataError as `generate` does."""
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        shapes = [list(row.shape) for row in rows]
        raise DataError(f"a prompt needs at least one token; got shapes {shapes}; expected B of [T], B and T >= 1.")
    for row in rows:
        if row.min() < 0 or row.max() >= model.spec.vocab:
            worst = row.min() if row.min() < 0 else row.max()
            raise DataError(f"a prompt has token {worst}; expected 0 <= token < {model.spec.vocab}.")
    length = max(len(row) for row in rows)
    check_length(model.spec, length + new_tokens, f"a prompt of {length} and {new_tokens} new ones")
    return rows


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
