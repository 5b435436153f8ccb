"""A stand-in for a backend's generation: logits by a function, tokens by `core.sampling`, on the host."""

from collections.abc import Callable, Sequence

import numpy as np

from moezoo.core.reference.sampling import penalized, sample
from moezoo.core.tokens import Integers


class HostGeneration:
    """Prompts of any lengths, and what follows them. `logits_of` gives logits [V] after tokens [T]."""

    def __init__(self, logits_of: Callable[[Integers], np.ndarray], prompts: Sequence[Integers], options):
        self._logits_of, self._options = logits_of, options
        self._rows = [np.asarray(prompt, np.int32) for prompt in prompts]

    def next(self) -> "HostTokens":
        """One more token of each."""
        logits = np.stack([self._logits_of(row) for row in self._rows]).astype(np.float32)
        penalty = self._options.repetition_penalty
        logits = np.concatenate([penalized(logits[b : b + 1], row[None], penalty) for b, row in enumerate(self._rows)])
        tokens = sample(logits, self._options, np.array([len(row) for row in self._rows], np.int32))
        self._rows = [np.append(row, token) for row, token in zip(self._rows, tokens, strict=True)]
        return HostTokens(tokens)


class HostTokens:
    """Tokens that are there already."""

    def __init__(self, tokens: Integers):
        self._tokens = tokens

    def fetch(self) -> Integers:
        return self._tokens
