"""Arrays in parts, one per stream, and arrays without the graph that they come from."""

import math

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.runtime.streams import streams

LOG2_E = 1 / math.log(2)

SMALL = 2**14
"""Number of elements up to which one thread is faster than two."""


def without_graph(arrays: list[mx.array]) -> list[mx.array]:
    """Return copies that do not keep the arrays that they were computed from alive. Waits for the values.

    Trap: arrays evaluated while MLX traces a gradient keep all their inputs until the backward pass ends, and the
    experts' slices force such an evaluation. A custom function has its own gradient and needs only its outputs.
    """
    mx.eval(arrays)
    return [mx.array(np.asarray(array)) for array in arrays]


def num_parts(x: mx.array) -> int:
    """Return the number of streams to use: a single token is done before another thread wakes up."""
    return 1 if x.size < SMALL else min(len(streams()), len(x))


def split_parts(x: mx.array, count: int) -> list[mx.array]:
    """Split the first axis into `count` parts."""
    return list(mx.split(x, [len(x) * part // count for part in range(1, count)]))
