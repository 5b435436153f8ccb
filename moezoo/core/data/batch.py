"""Sequences of a step, with their targets, and with the documents that they are packed with."""

from typing import NamedTuple

from moezoo.core.tokens import Integers


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
