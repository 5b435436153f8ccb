"""Token ids, targets, and the array types for them."""

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import DataError

Floats = NDArray[np.float32]

Integers = NDArray[np.int32]

IGNORED = -1
"""A masked target (ignore index): the position has no cross-entropy, but auxiliary losses still include it."""


def check_targets(tokens: Integers, targets: Integers) -> None:
    """Check the tokens and targets [B, T] of one forward pass.

    Trap: a mean over no targets is 0 / 0, and row -1 of an embedding is its last row, or unrelated memory.

    Raises DataError: all targets are IGNORED, or an input token is.
    """
    if not (targets != IGNORED).any():
        raise DataError(
            f"all targets are masked; got {targets.size} targets of {IGNORED} in a batch or micro-batch; "
            "expected at least one token id. Use larger micro-batches, or remove this batch."
        )
    if (tokens < 0).any():
        raise DataError(
            f"{IGNORED} is allowed as a target only; got it as an input token; expected token ids >= 0. "
            "In a window it may be in the last column only."
        )
