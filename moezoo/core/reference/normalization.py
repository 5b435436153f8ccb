"""Normalization layers."""

import autograd.numpy as np

from moezoo.core.reference import Array


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """`x / sqrt(mean(x^2) + epsilon) * scale`, the mean over the last axis, in float32 whatever the compute dtype.

    Args:
        x: [..., D] activations.
        scale: [D] learned, starts at one.
        epsilon: added to the mean of squares, not to its root.

    Returns:
        [..., D].

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    Differs: epsilon inside the root, as every released model has it.
    """
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale
