"""Sequences of a step, with their targets, and with the documents that they are packed with."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moezoo.core.tokens import Integers

NOWHERE = -1


class Positions(NamedTuple):
    """Positions of the input tokens of n sequences in the data.

    Fields:
        source: int64 [n], the source that each sequence is from.
        place: int64 [n, T], index of each token in the source's part of the split; NOWHERE for padding, and for a token
            that is context only, because it is an input of the window before.
    """

    source: NDArray[np.int64]
    place: NDArray[np.int64]


def row_positions(rows: NDArray[np.int64], sequence_length: int) -> Positions:
    """Return the positions of the inputs of these rows of an only source, which is rows of T tokens."""
    return Positions(np.zeros(len(rows), np.int64), rows[:, None] * sequence_length + np.arange(sequence_length))


class Batch(NamedTuple):
    """Sequences of a step, int32; arguments of `Model.train_step`.

    Fields:
        windows: [n, T + 1], or by micro-batch [A, b, T + 1], token ids: inputs are `[..., :-1]`.
        targets: [n, T], the next tokens; IGNORED where they are not trained on.
        documents: [n, T], the document ids of packed sequences; None: a sequence is one document.
    """

    windows: Integers
    targets: Integers
    documents: Integers | None = None

    def by_micro_batch(self, count: int) -> "Batch":
        """Return the batch with an axis of `count` micro-batches in front."""
        windows, targets = (part.reshape(count, -1, part.shape[-1]) for part in (self.windows, self.targets))
        documents = self.documents
        return Batch(windows, targets, None if documents is None else documents.reshape(targets.shape))
