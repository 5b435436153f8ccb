"""Exact arithmetic with integers of 63 bits, in words of 32: JAX has no wider ones unless they are switched on for all.

A number is four limbs of 16 bits, the lowest first, in uint32.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Limbs = tuple[jax.Array, ...]

_BITS, _LIMBS = 16, 4
_MASK = (1 << _BITS) - 1


def product(value: jax.Array, factor: int) -> Limbs:
    """Return `value * factor`, which must be below 2**64: of an array of integers of at most 32 bits and a number."""
    value = value.astype(jnp.uint32)
    factors = [jnp.uint32((factor >> (_BITS * place)) & _MASK) for place in range(_LIMBS)]
    parts = value & _MASK, value >> _BITS
    column = [jnp.zeros_like(value) for _ in range(_LIMBS + 3)]
    for low, part in enumerate(parts):
        for high, own in enumerate(factors):
            both = part * own
            column[low + high] += both & _MASK
            column[low + high + 1] += both >> _BITS
    limbs: list[jax.Array] = []
    for place in range(_LIMBS):
        limbs.append(column[place] & _MASK)
        column[place + 1] += column[place] >> _BITS
    return tuple(limbs)


def exclusive_or(one: Limbs, other: Limbs) -> Limbs:
    """Return the bits that one of two numbers has, but not both."""
    return tuple(first ^ second for first, second in zip(one, other, strict=True))


def remainder(value: Limbs, sizes: Sequence[int]) -> jax.Array:
    """Return `value mod size` for each of the sizes, which are below 2**31: int32 [..., sizes]."""
    sizes_N = jnp.asarray(sizes, jnp.uint32)
    free = 32 - max(sizes).bit_length()
    step = max(width for width in (16, 8, 4, 2, 1) if width <= free)  # so many more bits fit beside a remainder
    rest = jnp.zeros((*value[0].shape, len(sizes)), jnp.uint32)
    for limb in reversed(value):
        for shift in range(_BITS - step, -1, -step):
            digit = (limb >> shift) & ((1 << step) - 1)
            rest = ((rest << step) | digit[..., None]) % sizes_N
    return rest.astype(jnp.int32)
