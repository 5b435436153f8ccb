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
    source: "Source | None" = None


class Source(NamedTuple):
    """What new tokens may look at: keys and values, and the place of each among all tokens, negative where none is."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    place_S: jax.Array


class KVCache(NamedTuple):
    """Keys and values of the first `length` of S places; what lies beyond is masked by whoever attends."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    length: jax.Array

    def extended(self, key_BTMH: jax.Array, value_BTMH: jax.Array) -> tuple["KVCache", Source]:
        """The cache with T more places, and what they may look at. The caller sees to it that length + T <= S."""
        length = self.length + key_BTMH.shape[1]
        key_BSMH = lax.dynamic_update_slice(self.key_BSMH, key_BTMH, (0, self.length, 0, 0))
        value_BSMH = lax.dynamic_update_slice(self.value_BSMH, value_BTMH, (0, self.length, 0, 0))
        source = Source(key_BSMH, value_BSMH, jnp.arange(key_BSMH.shape[1]))
        return KVCache(key_BSMH, value_BSMH, length), source


class RollingCache(NamedTuple):
    """Keys and values of the last S of `length` places, place p in slot `p % S`: for who looks no further back."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    length: jax.Array

    def extended(self, key_BTMH: jax.Array, value_BTMH: jax.Array) -> tuple["RollingCache", Source]:
        """The cache after T more places, and what they may look at: the first of them still sees S - 1 before it."""
        new, size = key_BTMH.shape[1], self.key_BSMH.shape[1]
        length = self.length + new
        if new == 1:
            key_BSMH = lax.dynamic_update_slice(self.key_BSMH, key_BTMH, (0, self.length % size, 0, 0))
            value_BSMH = lax.dynamic_update_slice(self.value_BSMH, value_BTMH, (0, self.length % size, 0, 0))
            place_S = self.length - (self.length - jnp.arange(size)) % size
            return RollingCache(key_BSMH, value_BSMH, length), Source(key_BSMH, value_BSMH, place_S)
        both = [
            jnp.concatenate([jnp.roll(kept, -self.length, axis=1), more], axis=1)
            for kept, more in ((self.key_BSMH, key_BTMH), (self.value_BSMH, value_BTMH))
        ]
        key_BSMH, value_BSMH = (jnp.roll(part[:, new:], length, axis=1) for part in both)
        source = Source(both[0], both[1], self.length - size + jnp.arange(size + new))
        return RollingCache(key_BSMH, value_BSMH, length), source


class SharedCache(NamedTuple):
    """Of a layer that attends to another's keys and values: only how many tokens there are."""

    length: jax.Array

    def extended(self, length: int) -> "SharedCache":
        """The cache after so many more tokens."""
        return SharedCache(self.length + length)


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
    ) -> "DeltaCache":
        """The cache after T more tokens: the state is theirs already."""
        return DeltaCache(
            state_BMGHZ,
            _latest(self.query_BSMH, query_BTMH),
            _latest(self.key_BSMH, key_BTMH),
            _latest(self.value_BSNZ, value_BTNZ),
            self.length + query_BTMH.shape[1],
        )


class ConvolutionCache(NamedTuple):
    """The inputs that a convolution had from the last of `length` tokens, one fewer than its width."""

    input_BSZ: jax.Array
    length: jax.Array

    def extended(self, input_BTZ: jax.Array) -> "ConvolutionCache":
        """The cache after T more tokens."""
        return ConvolutionCache(_latest(self.input_BSZ, input_BTZ), self.length + input_BTZ.shape[1])


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
    ) -> "LatentCache":
        """As KVCache.extended."""
        start = (0, self.length, 0)
        index_key_BSH = self.index_key_BSH
        if index_key_BSH is not None:
            assert index_key_BTH is not None
            index_key_BSH = lax.dynamic_update_slice(index_key_BSH, index_key_BTH, start)
        return LatentCache(
            lax.dynamic_update_slice(self.latent_BSZ, latent_BTZ, start),
            lax.dynamic_update_slice(self.key_BSH, key_BTH, start),
            index_key_BSH,
            self.length + latent_BTZ.shape[1],
        )


Cache = KVCache | RollingCache | SharedCache | LatentCache | DeltaCache | ConvolutionCache


class Caches(NamedTuple):
    """One cache a layer, and the place at which each row begins; before it is padding. None: all begin at 0."""

    layers: list[Cache]
    first_B: jax.Array | None

    @property
    def places(self) -> jax.Array:
        """How many are filled, padding included."""
        return self.layers[0].length


def empty_cache(spec: ModelSpec, batch: int, size: int) -> list[Cache]:
    """One empty cache per layer, with room for `size` places, or for as many as anyone looks back at."""
    dtype = DTYPES[spec.precision.compute]
    caches: list[Cache] = []
    for index, layer in enumerate(spec.all_layers):
        match layer.attention:
            case GroupedQueryAttentionSpec(keys_of_layer=int()):
                caches.append(SharedCache(jnp.zeros((), jnp.int32)))
            case GroupedQueryAttentionSpec(num_kv_heads=heads, head_dim=head_dim, value_dim=value_dim):
                reach = spec.reach_of(index)
                kept = size if reach is None else min(size, reach)
                key = jnp.zeros((batch, kept, heads, head_dim), dtype)
                value = jnp.zeros((batch, kept, heads, value_dim), dtype)
                kind = KVCache if reach is None else RollingCache
                caches.append(kind(key, value, jnp.zeros((), jnp.int32)))
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


def _latest(before: jax.Array, new: jax.Array) -> jax.Array:
    """Of inputs [B, W - 1, ...] and T newer ones, the last W - 1."""
    return jnp.concatenate([before, new], axis=1)[:, new.shape[1] :]
