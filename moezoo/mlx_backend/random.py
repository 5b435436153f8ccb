"""Random numbers from counter-based keys. Spec: moezoo.core.random.

MLX's own generator assigns counters differently, so threefry is implemented here.
"""

import math

import mlx.core as mx

from moezoo.mlx_backend.distributed.data_parallel import first_draw

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def fold_in(key: mx.array, *data: int | mx.array) -> mx.array:
    """Spec: moezoo.core.random.fold_in; each of `data` is an integer, or uint32 [n] for n keys [2, n]."""
    for number in data:
        word = mx.array(number, mx.uint32) if isinstance(number, int) else number.astype(mx.uint32)
        key = mx.stack(list(_threefry(key, word)))
    return key


def bits(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Spec: moezoo.core.random.bits; one key or keys [2, n], each for fewer than 2**32 numbers.

    One key is for a whole batch, with sequences as the first axis of `shape`: each process draws its own sequences.
    """
    count = math.prod(shape)
    first = first_draw(count) if key.ndim == 1 else 0
    y0, y1 = _threefry(key[..., None], mx.arange(first, first + count, dtype=mx.uint32))
    return (y0 ^ y1).reshape((*key.shape[1:], *shape))


def uniform(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Spec: moezoo.core.random.uniform; one key or keys [2, n]."""
    return mx.view((bits(key, shape) >> 9) | 0x3F800000, mx.float32) - 1.0


def normal(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Spec: moezoo.core.random.normal; float32."""
    # Exact with and without fusion by the compiler: a multiple of 2**-23 below 1.
    return math.sqrt(2) * mx.erfinv(2.0 * uniform(key, shape) + 2.0**-23 - 1.0)


def gumbel(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Spec: moezoo.core.random.gumbel; float32."""
    return -mx.log(-mx.log(mx.maximum(uniform(key, shape), 2.0**-126)))


def bernoulli(key: mx.array, probability: float, shape: tuple[int, ...]) -> mx.array:
    """Spec: moezoo.core.random.bernoulli."""
    return uniform(key, shape) < mx.array(probability, mx.float32)


def _threefry(key: mx.array, x1: mx.array) -> tuple[mx.array, mx.array]:
    """Apply threefry2x32 with 20 rounds to the counters (0, x1)."""
    k0, k1 = key[0], key[1]
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = k0, x1 + k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + (group + 1)
    return x0, x1
