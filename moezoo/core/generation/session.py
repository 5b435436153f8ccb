"""Several generations, one after another, on the same caches: turns of a chat, requests that begin alike."""

from collections.abc import Collection, Generator, Sequence
from typing import Any

import numpy as np

from moezoo.core.backend import Generation, Model
from moezoo.core.generation.loop import OnLogits, checked_prompts, columns_of
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.reuse import Reuse
from moezoo.core.tokens import Integers


class Session:
    """Caches that stay on the device: of each prompt only the tokens after those that they hold are read.

    Attributes:
        num_read: tokens of the last prompt that were read.
        num_shared: tokens of the last prompt that the caches held.

    >>> session = Session(model)
    >>> answer = list(session.stream(prompt, max_new_tokens=100, options=options))
    >>> more = list(session.stream(np.concatenate([prompt, answer, question]), max_new_tokens=100, options=options))
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._held: tuple[Generation, list[int]] | None = None
        self.num_read = self.num_shared = 0

    def stream(
        self,
        prompt: Integers,
        *,
        max_new_tokens: int,
        options: SamplingOptions,
        end_tokens: Collection[int] = (),
        keep: Collection[int] = (),
        on_logits: OnLogits | None = None,
    ) -> Generator[int]:
        """Yield the tokens that `generate` returns for this prompt, int32 [T]; the caller may close it at any.

        `keep`: numbers of tokens after which a later prompt may differ from this one. A model with recurrent states or
        windows starts there again; one with full caches, at any token. `on_logits`: called with the model's logits
        [1, V] before each token.

        Raises DataError: as `generate`.
        """
        (row,) = checked_prompts(self._model, [prompt], max_new_tokens)
        tokens, generation = row.tolist(), None

        def start(rows: object, new_tokens: int, options: SamplingOptions) -> Generation:
            nonlocal generation
            before, held = self._held or (None, [])
            self._held = None  # what is interrupted from here on is lost
            length = min(shared_length(held, tokens), len(tokens) - 1)
            shared = 0 if before is None else before.reusable(length)
            self.num_shared, self.num_read = shared, len(tokens) - shared
            reuse = Reuse(before if shared else None, shared, keep)
            generation = self._model.start_generation([row], new_tokens, options, reuse)
            return generation

        told: dict[str, Any] = {"start": start, "on_logits": on_logits}
        for column in columns_of(self._model, [row], max_new_tokens, options, end_tokens, **told):
            tokens.append(int(column[0]))
            assert generation is not None
            self._held = generation, tokens
            yield tokens[-1]
            self._held = None
        if generation is not None:
            self._held = generation, tokens


def shared_length(held: Sequence[int] | Integers, tokens: Sequence[int] | Integers) -> int:
    """Return the number of tokens with which both begin."""
    length = min(len(held), len(tokens))
    differs = np.not_equal(held[:length], tokens[:length])
    return int(differs.argmax()) if differs.any() else length
