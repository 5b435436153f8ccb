"""Slices at an index that is computed, where XLA on the CPU would touch the whole array."""

import jax
import jax.numpy as jnp
from jax import lax


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Return `values[index]`, for a scalar index."""
    return rows(values, index, 1)[0]


def rows(values: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """Return `values[start : start + count]`."""
    if values.dtype.itemsize != 2:
        return lax.dynamic_slice_in_dim(values, start, count)
    # Trap: XLA on the CPU converts a whole bfloat16 array to float32 before slicing it, but slices integers directly.
    # It would also hoist operations on the whole array out of the loop, unless they depend on the index (the barrier).
    values, start = lax.optimization_barrier((values, start))
    bits = lax.dynamic_slice_in_dim(lax.bitcast_convert_type(values, jnp.uint16), start, count)
    taken: jax.Array = lax.bitcast_convert_type(bits, values.dtype)
    return taken
