"""Bisection over the bits of numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def greatest(holds: Callable[[jax.Array], jax.Array], bits: int, shape: tuple[int, ...]) -> jax.Array:
    """Return the greatest number of so many bits for which a condition holds that holds for all lower ones."""

    def with_bit(step: jax.Array, found: jax.Array) -> jax.Array:
        more = found | (jnp.uint32(1) << (bits - 1 - step).astype(jnp.uint32))
        return jnp.where(holds(more), more, found)

    found: jax.Array = lax.fori_loop(0, bits, with_bit, jnp.zeros(shape, jnp.uint32))
    return found
