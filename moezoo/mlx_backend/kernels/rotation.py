"""Rotation by one position as a matrix."""

import functools
from typing import assert_never

import numpy as np

from moezoo.core.reference.positions import frequencies
from moezoo.core.spec import RoPESpec
from moezoo.mlx_backend.kernels.x86 import is_x86_cpu
from moezoo.mlx_backend.runtime.cores import Floats


def turns_by_matrix(num_positions: int) -> bool:
    """Return True for one position on x86: there, a product with a matrix takes less time than eight operations."""
    return is_x86_cpu() and num_positions == 1


@functools.lru_cache(maxsize=64)
def turning_matrix(spec: RoPESpec, head_dim: int, position: int) -> Floats:
    """Return the matrix [H, H] that turns rows at one position, as `moezoo.mlx_backend.positions.rotate` does."""
    frequency, attention_factor = frequencies(spec, head_dim)
    angle, factor = np.float32(position) * frequency.astype(np.float32), np.float32(attention_factor)
    cosine, sine = factor * np.cos(angle), factor * np.sin(angle)
    matrix_HH, pair = np.eye(head_dim, dtype=np.float32), np.arange(len(cosine))
    match spec.layout:
        case "half_split":
            first, second = pair, pair + len(pair)
        case "interleaved":
            first, second = 2 * pair, 2 * pair + 1
        case _:
            assert_never(spec.layout)
    matrix_HH[first, first] = matrix_HH[second, second] = cosine
    matrix_HH[first, second], matrix_HH[second, first] = sine, -sine
    return matrix_HH
