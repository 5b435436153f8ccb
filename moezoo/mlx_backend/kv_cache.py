"""The key/value cache of one attention layer: a fixed number of slots, as on the JAX side."""

from typing import NamedTuple

import mlx.core as mx

from moezoo.core.spec import ModelSpec
from moezoo.mlx_backend.arrays import DTYPES


class Attended(NamedTuple):
    """Spec: moezoo.core.reference.attention.Attended; and the cache that the tokens have extended, None without one."""

    out_BTD: mx.array
    cache: "KVCache | None"
    value_BTMH: mx.array | None
    index_loss: mx.array | None


class KVCache(NamedTuple):
    """Keys and values of the first `length` of S positions; what lies beyond is masked by whoever attends."""

    key_BSMH: mx.array
    value_BSMH: mx.array
    length: int

    def extended(self, key_BTMH: mx.array, value_BTMH: mx.array, count: int | None = None) -> "KVCache":
        """The cache with T more positions, of which `count` stay. The caller sees to it that length + T <= S."""
        start = mx.array([self.length])
        return KVCache(
            mx.slice_update(self.key_BSMH, key_BTMH, start, (1,)),
            mx.slice_update(self.value_BSMH, value_BTMH, start, (1,)),
            self.length + (key_BTMH.shape[1] if count is None else count),
        )


def empty_cache(spec: ModelSpec, batch: int, size: int) -> list[KVCache]:
    """One empty cache of `size` positions per layer."""
    dtype = DTYPES[spec.precision.compute]
    caches = []
    for layer in spec.all_layers:
        shape = (batch, size, layer.attention.num_kv_heads, layer.attention.head_dim)
        caches.append(KVCache(mx.zeros(shape, dtype), mx.zeros(shape, dtype), 0))
    return caches
