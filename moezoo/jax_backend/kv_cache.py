"""The key/value cache of one attention layer: a fixed number of slots, so that decoding compiles once."""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.core.spec import (
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    ModelSpec,
    ShortConvolutionSpec,
)
from moezoo.jax_backend.arrays import DTYPES


class Attended(NamedTuple):
    """Spec: moezoo.core.reference.attention.Attended; and the cache that the tokens have extended, None without one."""

    out_BTD: jax.Array
    cache: "Cache | None"
    value_BTMH: jax.Array | None
    index_loss: jax.Array | None
    source: tuple[jax.Array, jax.Array] | None = None


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


class SharedCache(NamedTuple):
    """Of a layer that attends to another's keys and values: only how many tokens there are."""

    length: jax.Array

    def extended(self, length: int, count: jax.Array | int | None = None) -> "SharedCache":
        """The cache after so many more tokens, of which `count` stay."""
        return SharedCache(self.length + (length if count is None else count))


class DeltaCache(NamedTuple):
    """The state that `length` tokens have left, and the last inputs of the convolutions, one fewer than their width."""

    state_BMGHZ: jax.Array
    query_BSMH: jax.Array
    key_BSMH: jax.Array
    value_BSNZ: jax.Array
    length: jax.Array

    def extended(
        self,
        state_BMGHZ: jax.Array,
        query_BTMH: jax.Array,
        key_BTMH: jax.Array,
        value_BTNZ: jax.Array,
        count: jax.Array | int | None = None,
    ) -> "DeltaCache":
        """The cache after T more tokens, of which `count` stay: the state is theirs already."""
        count = query_BTMH.shape[1] if count is None else count
        return DeltaCache(
            state_BMGHZ,
            _latest(self.query_BSMH, query_BTMH, count),
            _latest(self.key_BSMH, key_BTMH, count),
            _latest(self.value_BSNZ, value_BTNZ, count),
            self.length + count,
        )


class ConvolutionCache(NamedTuple):
    """The inputs that a convolution had from the last of `length` tokens, one fewer than its width."""

    input_BSZ: jax.Array
    length: jax.Array

    def extended(self, input_BTZ: jax.Array, count: jax.Array | int | None = None) -> "ConvolutionCache":
        """The cache after T more tokens, of which `count` stay."""
        count = input_BTZ.shape[1] if count is None else count
        return ConvolutionCache(_latest(self.input_BSZ, input_BTZ, count), self.length + count)


class LatentCache(NamedTuple):
    """As KVCache, of latent attention: a latent and one rotated key a token, and an indexer's key if any."""

    latent_BSZ: jax.Array
    key_BSH: jax.Array
    index_key_BSH: jax.Array | None
    length: jax.Array

    def extended(
        self,
        latent_BTZ: jax.Array,
        key_BTH: jax.Array,
        index_key_BTH: jax.Array | None = None,
        count: jax.Array | int | None = None,
    ) -> "LatentCache":
        """As KVCache.extended."""
        start = (0, self.length, 0)
        index_key_BSH = self.index_key_BSH
        if index_key_BSH is not None:
            index_key_BSH = lax.dynamic_update_slice(index_key_BSH, index_key_BTH, start)
        return LatentCache(
            lax.dynamic_update_slice(self.latent_BSZ, latent_BTZ, start),
            lax.dynamic_update_slice(self.key_BSH, key_BTH, start),
            index_key_BSH,
            self.length + (latent_BTZ.shape[1] if count is None else count),
        )


Cache = KVCache | SharedCache | LatentCache | DeltaCache | ConvolutionCache


def empty_cache(spec: ModelSpec, batch: int, size: int) -> list[Cache]:
    """One empty cache of `size` positions per layer."""
    dtype = DTYPES[spec.precision.compute]
    caches: list[Cache] = []
    for layer in spec.all_layers:
        match layer.attention:
            case GroupedQueryAttentionSpec(keys_of_layer=int()):
                caches.append(SharedCache(jnp.zeros((), jnp.int32)))
            case GroupedQueryAttentionSpec(num_kv_heads=heads, head_dim=head_dim, value_dim=value_dim):
                key = jnp.zeros((batch, size, heads, head_dim), dtype)
                value = jnp.zeros((batch, size, heads, value_dim), dtype)
                caches.append(KVCache(key, value, jnp.zeros((), jnp.int32)))
            case LatentAttentionSpec(latent_dim=latent_dim, rope_head_dim=rope_head_dim, indexer=indexer):
                index_key = None if indexer is None else jnp.zeros((batch, size, indexer.head_dim), dtype)
                latent = jnp.zeros((batch, size, latent_dim), dtype)
                key = jnp.zeros((batch, size, rope_head_dim), dtype)
                caches.append(LatentCache(latent, key, index_key, jnp.zeros((), jnp.int32)))
            case GatedDeltaAttentionSpec():
                caches.append(empty_delta_cache(layer.attention, batch, dtype))
            case ShortConvolutionSpec():
                caches.append(empty_convolution_cache(layer.attention, batch, spec.embed_dim, dtype))
            case _:
                assert_never(layer.attention)
    return caches


def empty_delta_cache(spec: GatedDeltaAttentionSpec, batch: int, dtype: jnp.dtype) -> DeltaCache:
    """Before the first token: a state of zeros, float32, and zeros as inputs of the convolutions."""
    key_heads, value_heads = spec.num_key_heads, spec.num_value_heads
    state = (batch, key_heads, value_heads // key_heads, spec.key_head_dim, spec.value_head_dim)
    keys = (batch, spec.conv_width - 1, key_heads, spec.key_head_dim)
    values = (batch, spec.conv_width - 1, value_heads, spec.value_head_dim)
    return DeltaCache(
        jnp.zeros(state, jnp.float32),
        jnp.zeros(keys, dtype),
        jnp.zeros(keys, dtype),
        jnp.zeros(values, dtype),
        jnp.zeros((), jnp.int32),
    )


def empty_convolution_cache(
    spec: ShortConvolutionSpec, batch: int, embed_dim: int, dtype: jnp.dtype
) -> ConvolutionCache:
    """Before the first token: zeros as inputs."""
    return ConvolutionCache(jnp.zeros((batch, spec.conv_width - 1, embed_dim), dtype), jnp.zeros((), jnp.int32))


def _latest(before: jax.Array, new: jax.Array, count: jax.Array | int) -> jax.Array:
    """Of inputs [B, W - 1, ...] and T newer ones, of which `count` stay, the last W - 1."""
    both = jnp.concatenate([before, new], axis=1)
    return lax.dynamic_slice_in_dim(both, count, before.shape[1], axis=1)
