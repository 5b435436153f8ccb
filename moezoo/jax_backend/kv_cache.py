"""The key/value cache of one attention layer: a fixed number of slots, so that decoding compiles once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.arrays import DTYPES


class Attended(NamedTuple):
    """Spec: moezoo.core.reference.attention.Attended; and the cache that the tokens have extended, None without one."""

    out_BTD: jax.Array
    cache: "KVCache | None"
    value_BTMH: jax.Array | None
    index_loss: jax.Array | None


class KVCache(NamedTuple):
    """Keys and values of the first `length` of S positions; what lies beyond is masked by whoever attends."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    length: jax.Array

    def extended(self, key_BTMH: jax.Array, value_BTMH: jax.Array, count: jax.Array | int | None = None) -> "KVCache":
        """The cache with T more positions, of which `count` stay. The caller sees to it that length + T <= S."""
        start = (0, self.length, 0, 0)
        return KVCache(
            lax.dynamic_update_slice(self.key_BSMH, key_BTMH, start),
            lax.dynamic_update_slice(self.value_BSMH, value_BTMH, start),
            self.length + (key_BTMH.shape[1] if count is None else count),
        )


def empty_cache(spec: ModelSpec, batch: int, size: int) -> list[KVCache]:
    """One empty cache of `size` positions per layer."""
    dtype = DTYPES[spec.precision.compute]
    caches = []
    for layer in spec.all_layers:
        shape = (batch, size, layer.attention.num_kv_heads, layer.attention.head_dim)
        caches.append(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32)))
    return caches
