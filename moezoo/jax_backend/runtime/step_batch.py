"""The arrays of a training step: one argument of the compiled step. JAX only: MLX compiles none."""

from typing import Any, NamedTuple

import numpy as np


class StepBatch(NamedTuple):
    """Inputs, targets and documents of a step, int32 [A, B, T], or of one of its micro-batches, [B, T].

    `documents` is None where no sequence is packed.
    """

    tokens: Any
    targets: Any
    documents: Any = None


def step_batch(
    windows: np.ndarray, targets: np.ndarray | None = None, documents: np.ndarray | None = None
) -> StepBatch:
    """Return the inputs of windows [A, B, T + 1], the targets or the next tokens, and the documents."""
    return StepBatch(windows[..., :-1], windows[..., 1:] if targets is None else targets, documents)
