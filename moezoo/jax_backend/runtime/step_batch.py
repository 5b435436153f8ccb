"""The arrays of a training step: one argument of the compiled step. JAX only: MLX compiles none."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class StepBatch(NamedTuple):
    """Inputs, targets and documents of a step, int32 [A, B, T], or of one of its micro-batches, [B, T].

    `documents` is None where no sequence is packed. `forced` has the experts of each MoE layer, [A, B, T, K], or None.
    """

    tokens: Any
    targets: Any
    documents: Any = None
    forced: Any = None


def step_batch(
    windows: np.ndarray,
    targets: np.ndarray | None = None,
    documents: np.ndarray | None = None,
    forced: Sequence[np.ndarray] | None = None,
) -> StepBatch:
    """Return the inputs of windows [A, B, T + 1], the targets or the next tokens, documents and forced experts."""
    targets = windows[..., 1:] if targets is None else targets
    return StepBatch(windows[..., :-1], targets, documents, None if forced is None else list(forced))
