"""Stateless random numbers: counter-based threefry keys in NumPy, bit-equal to `jax.random`.

The caller names the purpose of a random number: `uniform(fold_in(key(seed), step, layer, purpose), shape)`.
There is no generator state to advance or save, so a resumed run draws the same numbers as an uninterrupted one, on
every backend. Keys and uniforms are bit-equal in NumPy, JAX and MLX; normal and Gumbel numbers differ by the rounding
of a logarithm or two, since they are transformed uniforms.
"""

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import SpecError

Bits = npt.NDArray[np.uint32]

ROUTER_JITTER, ROUTER_NOISE, ROUTER_SAMPLE, ATTENTION_DROPOUT, FEED_FORWARD_DROPOUT, SHORTCUT_DROPOUT = range(1, 7)
ADAPTER_DROPOUT = 7
"""Purposes of a layer's random numbers, as counters: `fold_in(key, ROUTER_NOISE)`. A number is never reused."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_WORD = 1 << 32
_TRAINING = 0x747261  # "tra": purpose of a seed's key in training, as a counter


def key(seed: int) -> Bits:
    """Return the key of a seed: uint32 [2], the high and low word of the seed.

    `seed` is an integer in [0, 2**64), else SpecError.

    Source: `jax.random.key`.
    Differs: JAX without 64-bit integers drops the high word, so seeds that differ only there draw the same numbers;
    here it is kept, as in JAX with 64-bit integers.
    """
    if not _is_integer(seed) or not 0 <= seed < 1 << 64:
        raise SpecError(
            f"the seed is not a valid counter; got {seed!r}; expected an integer in [0, 2**64). Use another seed."
        )
    return np.array([int(seed) >> 32, int(seed) & (_WORD - 1)], np.uint32)


def fold_in(key: Bits, *data: int) -> Bits:
    """Derive a new key from a key and counters, one after the other: fold_in(k, a, b) = fold_in(fold_in(k, a), b).

    `key` is uint32 [2]; each of `data` is an integer in [0, 2**32), else SpecError. Returns uint32 [2] =
    threefry(key, (0, data)); without data, the key itself.

    Source: `jax.random.fold_in`.
    """
    _check_key(key)
    for number in data:
        if not _is_integer(number) or not 0 <= number < _WORD:
            raise SpecError(
                f"a number to fold into a key does not fit its word; got {number!r}; expected an integer in "
                "[0, 2**32). Fold in a larger counter as two numbers, high word first."
            )
        y0, y1 = _threefry(key, np.zeros(1, np.uint32), np.array([number], np.uint32))
        key = np.concatenate([y0, y1])
    return key


def micro_batch_keys(seed: int, step: int, count: int) -> Bits:
    """Return the keys of a training step's micro-batches: uint32 [count, 2], functions of (seed, step, micro-batch).

    `step` counts from 0. Layers derive their own keys from them: fold_in(key, layer, purpose).
    """
    return split(fold_in(key(seed), _TRAINING, step), count)


def split(key: Bits, count: int) -> Bits:
    """Split a key into `count` keys: uint32 [count, 2], where row i is fold_in(key, i).

    `key` is uint32 [2]; `count` is an integer in [0, 2**32).

    Source: `jax.random.split` (partitionable mode).
    """
    _check_key(key)
    if not _is_integer(count) or not 0 <= count < _WORD:
        raise SpecError(f"cannot split a key into {count!r} keys; expected an integer in [0, 2**32).")
    return np.stack(_threefry(key, np.zeros(count, np.uint32), np.arange(count, dtype=np.uint32)), axis=-1)


def bits(key: Bits, shape: tuple[int, ...]) -> Bits:
    """Draw random bits: uint32 [*shape] for a key [2], or [*keys, *shape] for keys [*keys, 2], independent per key.

    Element i, counted row by row, is y0 xor y1 of threefry(key, (i >> 32, i mod 2**32)).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (threefry2x32, 20 rounds);
    `jax.random.bits` (partitionable mode, the default since JAX 0.5).
    """
    _check_key(key, batched=True)
    index = np.arange(math.prod(shape), dtype=np.uint64)
    y0, y1 = _threefry(key[..., None, :], (index >> np.uint64(32)).astype(np.uint32), index.astype(np.uint32))
    return np.bitwise_xor(y0, y1).reshape(key.shape[:-1] + tuple(shape))


def uniform(key: Bits, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Draw uniform numbers in [0, 1), multiples of 2**-23: float32 [*shape], or [*keys, *shape] as in `bits`.

    The top 23 bits become the mantissa of a number in [1, 2), minus one: exact on every machine. Scaling is left to
    the caller: a fused multiply-add inside a compiled backend would change the last bit.

    Source: `jax.random.uniform` with its default range.
    """
    return ((bits(key, shape) >> np.uint32(9)) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)


def normal(key: Bits, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Draw standard normal numbers: float64 [*shape], or [*keys, *shape] as in `bits`.

    `Phi^-1(u + 2**-24)` for a uniform u: the middle of its cell, so the distribution is symmetric, with maximum 5.3. A
    backend computes `sqrt(2) erfinv(2 u + 2**-23 - 1)`, whose argument is exact in float32.

    Differs: `jax.random.normal` transforms the lower end of a cell, so its numbers differ by up to one cell.
    """
    inverse = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])
    return np.asarray(inverse(uniform(key, shape).astype(np.float64) + 2.0**-24))


def gumbel(key: Bits, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Draw standard Gumbel numbers, `-log(-log(max(u, 2**-126)))`: float64 [*shape], or [*keys, *shape] as in `bits`.

    The argmax of `logits + gumbel` is a sample from softmax(logits). Source: `jax.random.gumbel`.
    """
    return -np.log(-np.log(np.maximum(uniform(key, shape).astype(np.float64), 2.0**-126)))


def bernoulli(key: Bits, probability: float, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Draw booleans that are True with probability `probability`: bool [*shape], or [*keys, *shape] as in `bits`.

    The probability is in [0, 1] and compared in float32.

    Source: `jax.random.bernoulli`.
    """
    return uniform(key, shape) < np.float32(probability)


def _threefry(key: Bits, x0: Bits, x1: Bits) -> tuple[Bits, Bits]:
    """Apply threefry2x32 with 20 rounds. The key's words broadcast with the counters, which have at least one axis.

    Trap: NumPy warns when a uint32 *scalar* overflows, but not when an array does; the algorithm relies on overflow.
    """
    k0, k1 = key[..., 0], key[..., 1]
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.array([group + 1], np.uint32)
    return x0, x1


def _is_integer(number: object) -> bool:
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _check_key(key: Bits, batched: bool = False) -> None:
    shape_ok = key.shape[-1:] == (2,) if batched else key.shape == (2,)
    if key.dtype != np.uint32 or not shape_ok:
        raise SpecError(
            f"not a random key; got {key.dtype} {list(key.shape)}; expected uint32 "
            f"[{'..., ' if batched else ''}2]. Make one with moezoo.core.random.key(seed)."
        )
