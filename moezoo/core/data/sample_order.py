"""Stateless random-access shuffling: the window of sample g as a pure function of g and the seed.

Three bijections, computed from counters in 64-bit integers. They are equal on every machine, take no memory, and can be
evaluated at any step:

    blend      g -> (source k, index j of the sample within that source)
    permute    j mod n -> window, within epoch j // n
    phase      epoch -> end of the first window of that epoch

The hash function is splitmix64's (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"), not the threefry of `moezoo.core.random`: it takes a tenth of the time, and no backend needs to reproduce
it.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ROUNDS = 6
_PHASE, _BLEND = 1, 2  # domain separation of hashes


def mix(words: Words) -> Words:
    """Hash 64-bit words bijectively (splitmix64 finalizer): uint64 [n] to uint64 [n].

    Trap: NumPy warns about overflow of uint64 scalars, but not of arrays; overflow is intended here.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return words ^ (words >> np.uint64(31))


def key(*counters: int) -> int:
    """Hash counters, each in [0, 2**64), to a 64-bit word; their order matters."""
    word = 0
    for counter in counters:
        word = (word + _GOLDEN) & _MASK ^ counter
        word = (word ^ (word >> 30)) * _MULTIPLIERS[0] & _MASK
        word = (word ^ (word >> 27)) * _MULTIPLIERS[1] & _MASK
        word ^= word >> 31
    return word


def permute(index: Words, size: int, keys: Words) -> Words:
    """Apply a pseudorandom permutation of 0..size-1 to each index: uint64 [n] to uint64 [n].

    `index` is in [0, size), `size` in [1, 2**62); `keys` is uint64 [n], each key selects a permutation. An index is
    split as left + a * right with a = ceil(sqrt(size)) and b = ceil(size / a); alternately, each half is shifted
    by a hash of the other (a Feistel network on Z_a x Z_b). A result >= `size` is permuted again until it is in
    range (cycle walking), which is needed for about one in sqrt(size).

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains": generalized Feistel, cycle walking.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    sizes = (np.uint64(a), np.uint64(b))
    result = index.copy()
    walking = np.arange(len(index))
    while len(walking):
        halves = [result[walking] % sizes[0], result[walking] // sizes[0]]
        round_key = keys[walking]
        for step in range(_ROUNDS):
            moved, other = step % 2, 1 - step % 2
            round_key = round_key + np.uint64(_GOLDEN)
            # Trap: reduce the hash first; (half + hash) % size would wrap at 2**64 and not be a bijection.
            halves[moved] = (halves[moved] + mix(halves[other] ^ round_key) % sizes[moved]) % sizes[moved]
        result[walking] = halves[0] + sizes[0] * halves[1]
        walking = walking[result[walking] >= np.uint64(size)]
    return result


def starts(index: Words, num_tokens: int, length: int, seed: int, source: int) -> Words:
    """Return the first token of the window of each sample of one source: uint64 [n] to uint64 [n].

    `index` counts the source's samples from 0, over all epochs. A window has `length` + 1 tokens, and
    `num_tokens` is at least that. Windows of an epoch end every `length` tokens, from an offset (phase) that changes
    with the epoch, so that window boundaries change too. The first ones and the last ones are moved into the source,
    so every token but the first is a target in every epoch.
    """
    n = windows_per_epoch(num_tokens, length)
    epoch, within = index // np.uint64(n), index % np.uint64(n)
    keys = mix(np.uint64(key(seed, source)) ^ mix(epoch + np.uint64(_GOLDEN)))
    phase = np.uint64(1) + mix(keys ^ np.uint64(key(_PHASE))) % np.uint64(length)
    last_target = phase + np.uint64(length) * permute(within, n, keys)
    return np.clip(last_target, np.uint64(length), np.uint64(num_tokens - 1)) - np.uint64(length)


def windows_per_epoch(num_tokens: int, length: int) -> int:
    """Return n = 1 + ceil((num_tokens - 2) / length): as many windows as the smallest phase needs to reach the end.

    They have n length - (num_tokens - 1) < 2 length targets more than the source, near its two ends.
    """
    return 1 - (2 - num_tokens) // length


def blend(sample: Words, weights: Sequence[float], seed: int) -> tuple[npt.NDArray[np.int64], Words]:
    """Return the source of each sample and its index in that source: uint64 [n] to (int64 [n], uint64 [n]).

    Of the samples 0..g-1, source 0 has floor(p g + u) with p its share of the weight and u in [0, 1) a
    hash of the seed; the remaining samples are divided among the other sources in the same way. So shares are exact to
    one sample per source, not only on average, and the indices of each source are 0, 1, 2, ... without gaps: each
    window is seen once per epoch *of its source*. Shares are rounded to multiples of 2**-32.
    """
    source = np.full(len(sample), len(weights) - 1, np.int64)
    index = sample.copy()
    rest = np.arange(len(sample))
    for k in range(len(weights) - 1):
        share = round(weights[k] / math.fsum(weights[k:]) * (1 << 32))
        share = min(max(share, 1), (1 << 32) - 1)
        offset = key(seed, _BLEND, k) >> 32
        before = _scaled(index[rest], share, offset)
        here = _scaled(index[rest] + np.uint64(1), share, offset) > before
        source[rest[here]] = k
        index[rest] = np.where(here, before, index[rest] - before)
        rest = rest[~here]
    return source, index


def _scaled(number: Words, share: int, offset: int) -> Words:
    """Return floor((number * share + offset) / 2**32) without overflow, for share, offset < 2**32."""
    low = (number & np.uint64(0xFFFFFFFF)) * np.uint64(share) + np.uint64(offset)
    return (number >> np.uint64(32)) * np.uint64(share) + (low >> np.uint64(32))
