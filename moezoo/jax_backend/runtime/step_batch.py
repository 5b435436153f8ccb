"""The arrays of a training step: one argument of the compiled step. JAX only: MLX compiles none."""

from typing import Any, NamedTuple

import numpy as np


class StepBatch(NamedTuple):
    """Inputs and targets of a step, both int32 [A, B, T], or of one of its micro-batches, [B, T]."""

    tokens: Any
    targets: Any


def step_batch(windows: np.ndarray, targets: np.ndarray | None = None) -> StepBatch:
    """Return the inputs of windows [A, B, T + 1], and the targets or the next tokens."""
    return StepBatch(windows[..., :-1], windows[..., 1:] if targets is None else targets)
