"""Random numbers from counter-based keys, also inside compiled functions. Spec: moezoo.core.random.

A key is a uint32 [2] array, which may be traced. The numbers are those of `jax.random` in its partitionable mode, the
default.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax


def fold_in(key: jax.Array, *data: int | jax.Array) -> jax.Array:
    """Spec: moezoo.core.random.fold_in; each of `data` is an integer or a uint32 scalar, which may be traced."""
    wrapped = _wrapped(key)
    for number in data:
        wrapped = jax.random.fold_in(wrapped, jnp.asarray(number, jnp.uint32))
    return jax.random.key_data(wrapped)


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Spec: moezoo.core.random.bits; one key."""
    return jax.random.bits(_wrapped(key), shape, jnp.uint32)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Spec: moezoo.core.random.uniform; one key."""
    return lax.bitcast_convert_type((bits(key, shape) >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Spec: moezoo.core.random.normal; float32."""
    # Exact with and without fusion by the compiler: a multiple of 2**-23 below 1.
    return math.sqrt(2) * lax.erf_inv(2.0 * uniform(key, shape) + 2.0**-23 - 1.0)


def gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Spec: moezoo.core.random.gumbel; float32."""
    return -jnp.log(-jnp.log(jnp.maximum(uniform(key, shape), 2.0**-126)))


def bernoulli(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """Spec: moezoo.core.random.bernoulli."""
    is_true: jax.Array = uniform(key, shape) < jnp.float32(probability)
    return is_true


def _wrapped(key: jax.Array) -> jax.Array:
    wrapped: jax.Array = jax.random.wrap_key_data(key, impl="threefry2x32")
    return wrapped
