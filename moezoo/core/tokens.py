"""Token ids, targets and the array types that carry them."""

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import DataError

Floats = NDArray[np.float32]

Integers = NDArray[np.int32]

IGNORED = -1
"""As a target: there is nothing to predict here. The token has no cross-entropy; auxiliary losses still see it."""


def check_targets(tokens: Integers, targets: Integers) -> None:
    """Raises DataError for one pass over tokens and targets [B, T] that all are IGNORED, or IGNORED as a token.

    Trap: a mean over no targets is 0 / 0, and a row -1 of an embedding is the last one, or stray memory.
    """
    if not (targets != IGNORED).any():
        raise DataError(
            f"no target counts; got {targets.size} targets in a batch or micro-batch, each of them {IGNORED}; "
            "expected at least one token id. Use larger parts, or leave this batch out."
        )
    if (tokens < 0).any():
        raise DataError(
            f"{IGNORED} may stand as a target only; got it as an input token. "
            "In a window it may stand in the last column alone."
        )
