"""The decoding loop, shared by backends: a token is computed while the previous one is fetched, decoded and printed."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import numpy as np

from moezoo.core.backend import Generation, Model, check_length
from moezoo.core.data.tokenizers import IdsLike, StreamDecoder, Tokenizer
from moezoo.core.errors import DataError, counted
from moezoo.core.generation.stop_strings import StopStrings
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.tokens import Floats, Integers

OnTokens = Callable[[Integers], Sequence[bool] | None]
"""Called with each new column of tokens, int32 [B]; it may return which sequences end there."""

OnLogits = Callable[[Floats], None]
"""Called with the model's logits before each column is yielded, float32 [B, V]."""


def generate(
    model: Model,
    prompts: Integers | Sequence[IdsLike],
    *,
    max_new_tokens: int,
    options: SamplingOptions,
    end_tokens: Collection[int] = (),
    padding: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Integers:
    """Generate a continuation of each of B prompts.

    It does not depend on the other prompts, except that a prompt's index in the batch selects its random numbers.

    Args:
        model: a built model.
        prompts: int32 [B, T], or B prompts of any lengths; T >= 1, 0 <= token < V.
        max_new_tokens: number of tokens to generate, at most.
        options: temperature 0 is greedy; a token depends on (seed, position, sequence index) and the logits only.
        end_tokens: stop when every sequence has produced one of these.
        padding: token after the end of a sequence while others continue; None: repeat its end token.
        on_tokens: called with each new column, int32 [B]; it may return which sequences end here, bool [B].

    Returns:
        int32 [B, new], new <= max_new_tokens.

    Raises DataError: an empty prompt, a token outside the vocabulary, more tokens than positions, or logits that cannot
    be sampled from.
    """
    rows = checked_prompts(model, prompts, max_new_tokens)
    columns = list(columns_of(model, rows, max_new_tokens, options, end_tokens, padding, on_tokens))
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0), np.int32)


def stream_ids(
    model: Model,
    prompts: Integers | Sequence[IdsLike],
    *,
    max_new_tokens: int,
    options: SamplingOptions,
    end_tokens: Collection[int] = (),
    padding: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Iterator[Integers]:
    """Return an iterator over the columns of what `generate` returns, int32 [B] each, as they are generated.

    Raises what `generate` raises; what is wrong with the prompts, at once.
    """
    rows = checked_prompts(model, prompts, max_new_tokens)
    return columns_of(model, rows, max_new_tokens, options, end_tokens, padding, on_tokens)


def columns_of(
    model: Model,
    rows: Sequence[Integers],
    max_new_tokens: int,
    options: SamplingOptions,
    end_tokens: Collection[int],
    padding: int | None = None,
    on_tokens: OnTokens | None = None,
    start: Callable[[Sequence[Integers], int, SamplingOptions], Generation] | None = None,
    on_logits: OnLogits | None = None,
) -> Iterator[Integers]:
    """Yield what `stream_ids` does, of checked prompts; `start`: in place of the model's `start_generation`."""
    if padding is not None and not 0 <= padding < model.spec.vocab:
        padding = None  # some files have a padding token outside the vocabulary of their model
    if max_new_tokens <= 0:
        return
    ended, previous = np.zeros(len(rows), bool), np.zeros(len(rows), np.int32)
    generation = (start or model.start_generation)(rows, max_new_tokens, options)
    pending = generation.next()
    for index in range(max_new_tokens):
        following = generation.next() if index + 1 < max_new_tokens else pending
        column = pending.fetch()
        if on_logits is not None:
            on_logits(pending.logits())
        pending = following
        if ended.any():
            column = np.where(ended, previous if padding is None else np.int32(padding), column).astype(np.int32)
        ended |= np.isin(column, list(end_tokens))
        stopped = None if on_tokens is None else on_tokens(column)
        if stopped is not None:
            ended |= np.asarray(stopped)
        yield column
        if ended.all():
            return
        previous = column


def checked_prompts(model: Model, prompts: Integers | Sequence[IdsLike], new_tokens: int) -> list[Integers]:
    """Convert prompts to int32 rows and check them. Raises DataError, as `generate` does."""
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        shapes = [list(row.shape) for row in rows]
        raise DataError(
            f"a prompt needs at least one token; got shapes {shapes}; expected B rows of [T], B and T >= 1."
        )
    for row in rows:
        if row.min() < 0 or row.max() >= model.spec.vocab:
            worst = row.min() if row.min() < 0 else row.max()
            raise DataError(
                f"a prompt has a token outside the vocabulary; got {worst}; expected 0 <= token < {model.spec.vocab}. "
                "Encode prompts with the model's tokenizer."
            )
    length = max(len(row) for row in rows)
    check_length(
        model.spec,
        length + new_tokens,
        f"a prompt of {counted(length, 'token')} and {counted(new_tokens, 'new token')}",
    )
    return rows


class Continuation:
    """Streaming text of one generated sequence up to its end token; without a tokenizer, `,17` for token 17.

    Attributes:
        tokens: the sequence up to its end, an end token and the tokens of a stop string included.
        ended_by: "end_token", "stop" for a stop string, or "length" if it has not ended.

    >>> continuation = Continuation(tokenizer, prompt_ids, model.generation.end_tokens)
    >>> pieces = [continuation.add(token) for token in new] + [continuation.finish()]
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt: IdsLike, end_tokens: Collection[int], stop: Sequence[str] = ()
    ) -> None:
        """`stop`: texts that end the sequence too; nothing of them is returned. Raises SpecError: one is empty."""
        # Trap: some tokenizers omit the space before the first word, so the prompt's ids are needed.
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, prompt)
        self._end_tokens, self._stop = end_tokens, StopStrings(stop)
        self.tokens: list[int] = []
        self.ended_by: Literal["end_token", "stop", "length"] = "length"

    @property
    def ended(self) -> bool:
        """An end token or a stop string has come."""
        return self.ended_by != "length"

    def add(self, token: int) -> str:
        """Return the text that this token completes; empty from the end on."""
        if self.ended:
            return ""
        self.tokens.append(token)
        if token in self._end_tokens:
            self.ended_by = "end_token"
            return ""
        return self._before_stop(f",{token}" if self._decoder is None else self._decoder.add([token]))

    def finish(self) -> str:
        """Return the rest: the bytes left over from an incomplete character, as replacement text."""
        rest = "" if self._decoder is None or self.ended_by == "stop" else self._decoder.finish()
        return self._before_stop(rest) + self._stop.finish()

    def _before_stop(self, piece: str) -> str:
        text = self._stop.add(piece)
        if self._stop.found is not None:
            self.ended_by = "stop"
        return text


def until_stop(
    continuations: Sequence[Continuation], on_tokens: OnTokens | None = None
) -> Callable[[Integers], list[bool]]:
    """Return an `on_tokens` that ends each sequence where its continuation does, or where another one does."""

    def add(column: Integers) -> list[bool]:
        others = None if on_tokens is None else on_tokens(column)
        for continuation, token in zip(continuations, column, strict=True):
            continuation.add(int(token))
        ended = [continuation.ended for continuation in continuations]
        return ended if others is None else [own or other for own, other in zip(ended, others, strict=True)]

    return add


def text_pieces(columns: Iterator[Integers], continuations: Sequence[Continuation]) -> Iterator[list[str]]:
    """Yield the text that each column completes, a piece for each of B sequences, until all have ended."""
    for column in columns:
        yield [continuation.add(int(token)) for continuation, token in zip(continuations, column, strict=True)]
        if all(continuation.ended for continuation in continuations):
            break
    yield [continuation.finish() for continuation in continuations]
