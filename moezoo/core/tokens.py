"""Inputs of a model: token ids, targets, masks of experts, and the array types for them."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import DataError

Floats = NDArray[np.float32]
"""Numbers in float32."""

Integers = NDArray[np.int32]
"""Token ids, experts or targets in int32."""

Flags = NDArray[np.bool_]
"""Truth values."""

Counts = NDArray[np.int64]
"""Numbers of tokens or assignments."""

Column = NDArray[Any]
"""One value for each row of a table, in the dtype of that column."""

IGNORED = -1
"""A masked target (ignore index): the position has no cross-entropy, but auxiliary losses still include it."""

PADDING = -1
"""Document id of the places of a packed sequence that no document fills. They come last."""

UNUSED = -1
"""Expert id of a slot that the router left unused."""

NOT_REPLAYED = -2
"""Expert id in all slots of a token that forced routing leaves to the router. (UNUSED in all: a token of no expert.)"""


class ExpertMasks(NamedTuple):
    """Experts of one MoE layer that each sequence of a batch does without: bool [B, E], or None for none.

    Zero-computation experts are among the E, after the others; shared experts are not.

    Fields:
        silenced: chosen as ever, but with combine weight 0; the other weights stay as they are.
        excluded: never chosen; the router takes the best of the others, and weights them as its spec says.
    """

    silenced: NDArray[np.bool_] | None = None
    excluded: NDArray[np.bool_] | None = None

    def of_batch(self, number: int) -> "ExpertMasks":
        """Return the masks of one sequence for each of a number of them."""
        return ExpertMasks(*(None if mask is None else np.repeat(mask, number, axis=0) for mask in self))


NO_MASKS = ExpertMasks()


def masked(ids: Integers, trained: NDArray[np.bool_]) -> Integers:
    """Mark ids that are not trained on by their complement: ~id, which is negative.

    So one array has the tokens and which of them are targets, in the token cache and in a batch.
    """
    return np.where(trained, ids, ~ids)


def tokens_of(marked: Integers) -> Integers:
    """Return the token ids of ids that `masked` has marked."""
    return np.where(marked < 0, ~marked, marked)


def targets_of(marked: Integers) -> Integers:
    """Return ids that `masked` has marked as targets: IGNORED where they are not trained on."""
    return np.maximum(marked, IGNORED)


def check_targets(tokens: Integers, targets: Integers, *, whole: bool = True) -> None:
    """Check the tokens and targets of one forward pass, [B, T], or of a training step, [A, B, T].

    `whole`: False for one process's part of a batch, which may have no targets if that of another process has.

    Trap: a mean over no targets is 0 / 0, and row -1 of an embedding is its last row, or unrelated memory.

    Raises DataError: all targets are IGNORED, an input token is, or the shapes differ.
    """
    if tokens.shape != targets.shape:
        raise DataError(
            f"tokens and targets differ in shape; got {list(tokens.shape)} and {list(targets.shape)}; expected one "
            "target for each input token."
        )
    if whole and not (targets != IGNORED).any():
        raise DataError(
            f"all targets are masked; got {targets.size} targets of {IGNORED} in a batch; expected at least one token "
            "id. Use longer sequences, larger batches, or data with more to learn."
        )
    if (tokens < 0).any():
        raise DataError(
            f"{IGNORED} is allowed as a target only; got it as an input token; expected token ids >= 0. "
            "In a window it may be in the last column only."
        )


def check_documents(tokens: Integers, targets: Integers | None, documents: Integers | None) -> None:
    """Check the document ids [..., B, T] of packed sequences, if there are any.

    Raises DataError: another shape than the tokens', ids that fall along a sequence before its padding, or a target in
    padding.
    """
    if documents is None:
        return
    if documents.shape != tokens.shape:
        raise DataError(
            f"documents are {list(documents.shape)}, but tokens are {list(tokens.shape)}. Give each token a document."
        )
    last = np.iinfo(np.int32).max
    if (documents < PADDING).any() or (np.diff(np.where(documents == PADDING, last, documents)) < 0).any():
        raise DataError(
            f"document ids fall along a sequence; expected ids >= 0 in ascending order, then {PADDING} for padding. "
            "Number the documents of each sequence in their order."
        )
    if targets is not None and (targets[documents == PADDING] != IGNORED).any():
        raise DataError(f"padding has targets; expected {IGNORED} where the document id is {PADDING}. Mask them.")
