"""Slices at an index that is computed, where XLA on the CPU would touch the whole array."""

import jax
import jax.numpy as jnp
from jax import lax


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Return `values[index]`, for a scalar index."""
    row: jax.Array
    if values.dtype.itemsize != 2:
        row = lax.dynamic_index_in_dim(values, index, keepdims=False)
        return row
    # Trap: XLA on the CPU converts a whole bfloat16 array to float32 before slicing it, but slices integers directly.
    # It would also hoist operations on the whole array out of the loop, unless they depend on the index (the barrier).
    values, index = lax.optimization_barrier((values, index))
    bits = lax.dynamic_index_in_dim(lax.bitcast_convert_type(values, jnp.uint16), index, keepdims=False)
    row = lax.bitcast_convert_type(bits, values.dtype)
    return row
