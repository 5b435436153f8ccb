"""Key/value caches of attention layers, with a fixed number of slots, so that decoding compiles once.

A slot is the index of a token in its row, left padding included; a position is its index in the sequence itself.
"""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.core.spec import (
    BlockIndexerSpec,
    CompressedAttentionSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    ModelSpec,
    NoAttentionSpec,
    ShortConvolutionSpec,
)
from moezoo.jax_backend.arrays import DTYPES
from moezoo.jax_backend.entry_cache import CompressedCache, empty_compressed_cache, rolled
from moezoo.jax_backend.state_cache import ConvolutionCache as ConvolutionCache
from moezoo.jax_backend.state_cache import ConvolutionState as ConvolutionState
from moezoo.jax_backend.state_cache import KeyValueState as KeyValueState
from moezoo.jax_backend.state_cache import NGramState as NGramState
from moezoo.jax_backend.state_cache import RecurrentCache as RecurrentCache
from moezoo.jax_backend.state_cache import ScanCache as ScanCache
from moezoo.jax_backend.state_cache import StateCache as StateCache
from moezoo.jax_backend.state_cache import empty_convolution_cache as empty_convolution_cache
from moezoo.jax_backend.state_cache import empty_convolution_state as empty_convolution_state
from moezoo.jax_backend.state_cache import empty_key_value_state as empty_key_value_state
from moezoo.jax_backend.state_cache import empty_ngram_state as empty_ngram_state
from moezoo.jax_backend.state_cache import empty_recurrent_cache as empty_recurrent_cache
from moezoo.jax_backend.state_cache import empty_scan_cache as empty_scan_cache
from moezoo.jax_backend.state_cache import empty_state_cache as empty_state_cache


class Attended(NamedTuple):
    """Spec: moezoo.core.reference.attention.Attended; with the extended cache, or None without one."""

    out_BTD: jax.Array
    cache: "Cache | None"
    value_BTMH: jax.Array | None
    index_loss: jax.Array | None
    source: "Shared | None" = None


class Source(NamedTuple):
    """Keys and values that new tokens may attend to, and the slot of each; an empty slot is negative."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    slot_S: jax.Array


Shared = Source | jax.Array
"""What a layer has that later ones may share: keys and values, or the positions bool [B, T, S] that it chose."""


class KVCache(NamedTuple):
    """Keys and values of S slots, of which the first `length` are filled; attention masks the rest."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    length: jax.Array

    def extend(self, key_BTMH: jax.Array, value_BTMH: jax.Array) -> tuple["KVCache", Source]:
        """Append T tokens: return the new cache, and what they may attend to. The caller ensures length + T <= S."""
        length = self.length + key_BTMH.shape[1]
        key_BSMH = lax.dynamic_update_slice(self.key_BSMH, key_BTMH, (0, self.length, 0, 0))
        value_BSMH = lax.dynamic_update_slice(self.value_BSMH, value_BTMH, (0, self.length, 0, 0))
        source = Source(key_BSMH, value_BSMH, jnp.arange(key_BSMH.shape[1]))
        return KVCache(key_BSMH, value_BSMH, length), source


class IndexedCache(NamedTuple):
    """KVCache with an indexer's key of each token beside."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    index_key_BSH: jax.Array
    length: jax.Array

    def with_index(self, index_key_BTH: jax.Array) -> tuple["IndexedCache", jax.Array]:
        """Return the cache with index keys of the T tokens that `extend` appends, and those of all slots."""
        index_key_BSH = lax.dynamic_update_slice(self.index_key_BSH, index_key_BTH, (0, self.length, 0))
        cache = self._replace(index_key_BSH=index_key_BSH)
        return cache, index_key_BSH

    def extend(self, key_BTMH: jax.Array, value_BTMH: jax.Array) -> tuple["IndexedCache", Source]:
        """Append T tokens, as KVCache.extend does."""
        cache, source = KVCache(self.key_BSMH, self.value_BSMH, self.length).extend(key_BTMH, value_BTMH)
        return IndexedCache(cache.key_BSMH, cache.value_BSMH, self.index_key_BSH, cache.length), source


class RollingCache(NamedTuple):
    """Keys and values of the last S of `length` slots, slot s at index `s % S`: for sliding windows and chunks."""

    key_BSMH: jax.Array
    value_BSMH: jax.Array
    length: jax.Array

    def extend(self, key_BTMH: jax.Array, value_BTMH: jax.Array) -> tuple["RollingCache", Source]:
        """Append T tokens: return the new cache, and what they may attend to.

        The first of them may still attend to the S - 1 slots before it.
        """
        (key_BSMH, value_BSMH), seen, slot_S = rolled(
            (self.key_BSMH, self.value_BSMH), (key_BTMH, value_BTMH), self.length
        )
        cache = RollingCache(key_BSMH, value_BSMH, self.length + key_BTMH.shape[1])
        return cache, Source(seen[0], seen[1], slot_S)


class ConvolvedCache(NamedTuple):
    """Keys and values behind convolutions, and the state of these."""

    kept: KVCache | RollingCache
    state: ConvolutionState | KeyValueState

    @property
    def length(self) -> jax.Array:
        """Number of filled slots."""
        return self.kept.length

    def extend(self, key_BTMH: jax.Array, value_BTMH: jax.Array) -> tuple["ConvolvedCache", Source]:
        """Append T tokens, as the cache that is kept does; the state is replaced by who computes it."""
        kept, source = self.kept.extend(key_BTMH, value_BTMH)
        return ConvolvedCache(kept, self.state), source


class SharedCache(NamedTuple):
    """Number of tokens, for a layer that attends to the keys and values of another layer, or to nothing."""

    length: jax.Array

    def extend(self, length: int) -> "SharedCache":
        """Append `length` tokens."""
        return SharedCache(self.length + length)


class OutputsCache(NamedTuple):
    """Cache of a layer's mixer, and the last inputs of the short convolutions of what its blocks return."""

    mixer: "Cache"
    attention_BSD: jax.Array | None
    feed_forward_BSD: jax.Array | None

    @property
    def length(self) -> jax.Array:
        """Number of filled slots."""
        return self.mixer.length


class LatentCache(NamedTuple):
    """KVCache for latent attention: a latent and one rotated key per token, and an indexer's key if there is one."""

    latent_BSZ: jax.Array
    key_BSH: jax.Array
    index_key_BSH: jax.Array | None
    length: jax.Array

    def extend(
        self,
        latent_BTZ: jax.Array,
        key_BTH: jax.Array,
        index_key_BTH: jax.Array | None = None,
    ) -> "LatentCache":
        """Append T tokens, as KVCache.extend does."""
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


class NGramCache(NamedTuple):
    """Cache of a layer with n-gram embeddings: that of its mixer, and theirs."""

    mixer: "Cache"
    ngrams: NGramState

    @property
    def length(self) -> jax.Array:
        """Number of tokens."""
        return self.mixer.length


Cache = (
    KVCache
    | RollingCache
    | ConvolvedCache
    | IndexedCache
    | SharedCache
    | LatentCache
    | RecurrentCache
    | StateCache
    | ConvolutionCache
    | ScanCache
    | NGramCache
    | CompressedCache
    | OutputsCache
)


class Caches(NamedTuple):
    """One cache per layer, and the slot at which each row starts, after its left padding; None: all start at 0."""

    layers: list[Cache]
    first_B: jax.Array | None

    @property
    def places(self) -> jax.Array:
        """Number of filled slots, padding included."""
        return self.layers[0].length


STATES = (
    *(RollingCache, ConvolvedCache, RecurrentCache, StateCache, ConvolutionCache, ScanCache, NGramCache),
    CompressedCache,
    OutputsCache,
)
"""Caches that cannot be cut back to fewer tokens, since they do not keep all."""

States = dict[int, Cache]
"""Caches of this kind, by the index of their layer."""


def states_of(caches: Caches) -> States:
    """Return the caches that cannot be cut back, for `cut_back`. They are copies: the caches are donated."""
    return {
        index: jax.tree.map(jnp.copy, cache) for index, cache in enumerate(caches.layers) if isinstance(cache, STATES)
    }


def cut_back(caches: Caches, length: int, states: States) -> Caches:
    """Return caches of the first `length` slots, padding included; `states`: those after them."""
    layers: list[Cache] = [
        states[index] if isinstance(cache, STATES) else cache._replace(length=jnp.full_like(cache.length, length))
        for index, cache in enumerate(caches.layers)
    ]
    return Caches(layers, caches.first_B)


def empty_cache(spec: ModelSpec, batch: int, size: int) -> list[Cache]:
    """Return one empty cache per layer, with `size` slots, or with as many as its window or chunks reach back."""
    dtype = DTYPES[spec.precision.compute]
    caches: list[Cache] = []
    for layer, reach in zip(spec.all_layers, spec.reaches, strict=True):
        match layer.attention:
            case GroupedQueryAttentionSpec(keys_of_layer=int()) | NoAttentionSpec():
                caches.append(SharedCache(jnp.zeros((), jnp.int32)))
            case GroupedQueryAttentionSpec(indexer=BlockIndexerSpec(head_dim=width)):
                key = jnp.zeros((batch, size, layer.attention.num_kv_heads, layer.attention.head_dim), dtype)
                value = jnp.zeros((*key.shape[:3], layer.attention.value_dim), dtype)
                caches.append(
                    IndexedCache(key, value, jnp.zeros((batch, size, width), dtype), jnp.zeros((), jnp.int32))
                )
            case GroupedQueryAttentionSpec(num_kv_heads=heads, head_dim=head_dim, value_dim=value_dim):
                kept = size if reach is None else min(size, reach)
                key = jnp.zeros((batch, kept, heads, head_dim), dtype)
                value = jnp.zeros((batch, kept, heads, value_dim), dtype)
                kind = KVCache if reach is None else RollingCache
                cache = kind(key, value, jnp.zeros((), jnp.int32))
                if layer.attention.convolution is not None:
                    caches.append(ConvolvedCache(cache, empty_convolution_state(layer.attention, batch, dtype)))
                elif layer.attention.kv_convolution is not None:
                    caches.append(ConvolvedCache(cache, empty_key_value_state(layer.attention, batch, dtype)))
                else:
                    caches.append(cache)
            case LatentAttentionSpec(latent_dim=latent_dim, rope_head_dim=rope_head_dim, window=int(window)):
                kept = min(size, window)
                key = jnp.zeros((batch, kept, 1, rope_head_dim), dtype)
                caches.append(
                    RollingCache(key, jnp.zeros((batch, kept, 1, latent_dim), dtype), jnp.zeros((), jnp.int32))
                )
            case LatentAttentionSpec(latent_dim=latent_dim, rope_head_dim=rope_head_dim, indexer=indexer):
                index_key = None if indexer is None else jnp.zeros((batch, size, indexer.cached_dim), dtype)
                latent = jnp.zeros((batch, size, latent_dim), dtype)
                key = jnp.zeros((batch, size, rope_head_dim), dtype)
                caches.append(LatentCache(latent, key, index_key, jnp.zeros((), jnp.int32)))
            case CompressedAttentionSpec():
                caches.append(empty_compressed_cache(layer.attention, batch, size, dtype))
            case GatedDeltaAttentionSpec() | Mamba2Spec():
                caches.append(empty_recurrent_cache(layer.attention, batch, dtype))
            case LightningAttentionSpec():
                caches.append(empty_state_cache(layer.attention, batch))
            case MambaSpec():
                caches.append(empty_scan_cache(layer.attention, batch, dtype))
            case ShortConvolutionSpec():
                caches.append(empty_convolution_cache(layer.attention, batch, spec.embed_dim, dtype))
            case _:
                assert_never(layer.attention)
        if layer.output_convolution is not None:
            shape = (batch, layer.output_convolution.width - 1, spec.embed_dim)
            own = [
                jnp.zeros(shape, dtype) if has_block else None for has_block in (layer.has_mixer, not layer.mixer_only)
            ]
            caches[-1] = OutputsCache(caches[-1], *own)
        if layer.ngram_embeddings is not None:
            state = empty_ngram_state(layer.ngram_embeddings, batch, spec.num_streams, spec.embed_dim, dtype)
            caches[-1] = NGramCache(caches[-1], state)
    return caches
