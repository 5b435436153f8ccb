"""Key/value caches of attention layers, with a fixed number of slots, as in the JAX backend.

A slot is the index of a token in its row, left padding included; a position is its index in the sequence itself.
"""

from typing import NamedTuple, assert_never

import mlx.core as mx

from moezoo.core.spec import (
    CompressedAttentionSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    ModelSpec,
    NGramEmbeddingsSpec,
    NoAttentionSpec,
    ShortConvolutionSpec,
)
from moezoo.mlx_backend.arrays import DTYPES
from moezoo.mlx_backend.entry_cache import CompressedCache, empty_compressed_cache, rolled


class Attended(NamedTuple):
    """Spec: moezoo.core.reference.attention.Attended; with the extended cache, or None without one."""

    out_BTD: mx.array
    cache: "Cache | None"
    value_BTMH: mx.array | None
    index_loss: mx.array | None
    source: "Shared | None" = None


class Source(NamedTuple):
    """Keys and values that new tokens may attend to, and the slot of each; an empty slot is negative."""

    key_BSMH: mx.array
    value_BSMH: mx.array
    slot_S: mx.array


Shared = Source | mx.array
"""What a layer has that later ones may share: keys and values, or the positions bool [B, T, S] that it chose."""


class KVCache(NamedTuple):
    """Keys and values of S slots, of which the first `length` are filled; attention masks the rest."""

    key_BSMH: mx.array
    value_BSMH: mx.array
    length: int

    def extend(self, key_BTMH: mx.array, value_BTMH: mx.array) -> tuple["KVCache", Source]:
        """Append T tokens: return the new cache, and what they may attend to. The caller ensures length + T <= S."""
        length = self.length + key_BTMH.shape[1]
        key_BSMH = mx.slice_update(self.key_BSMH, key_BTMH, mx.array([self.length]), (1,))
        value_BSMH = mx.slice_update(self.value_BSMH, value_BTMH, mx.array([self.length]), (1,))
        source = Source(key_BSMH[:, :length], value_BSMH[:, :length], mx.arange(length))
        return KVCache(key_BSMH, value_BSMH, length), source


class RollingCache(NamedTuple):
    """Keys and values of the last S of `length` slots, slot s at index `s % S`: for sliding windows and chunks."""

    key_BSMH: mx.array
    value_BSMH: mx.array
    length: int

    def extend(self, key_BTMH: mx.array, value_BTMH: mx.array) -> tuple["RollingCache", Source]:
        """Append T tokens: return the new cache, and what they may attend to.

        The first of them may still attend to the S - 1 slots before it.
        """
        (key_BSMH, value_BSMH), seen, slot_S = rolled(
            (self.key_BSMH, self.value_BSMH), (key_BTMH, value_BTMH), self.length
        )
        cache = RollingCache(key_BSMH, value_BSMH, self.length + key_BTMH.shape[1])
        return cache, Source(seen[0], seen[1], slot_S)


class ConvolutionState(NamedTuple):
    """The last inputs of the two convolutions of queries and keys, and delayed values of the last token."""

    query_BSNH: mx.array
    key_BSMH: mx.array
    filtered_query_BSNH: mx.array
    filtered_key_BSMH: mx.array
    value_BSZ: mx.array

    def extend(self, *new: mx.array) -> "ConvolutionState":
        """Append T tokens, given in the order of the fields."""
        return ConvolutionState._make(_latest(before, own) for before, own in zip(self, new, strict=True))


class ConvolvedCache(NamedTuple):
    """Keys and values of convolutional attention, and the state of its convolutions."""

    kept: KVCache | RollingCache
    state: ConvolutionState

    @property
    def length(self) -> int:
        """Number of filled slots."""
        return self.kept.length

    def extend(self, key_BTMH: mx.array, value_BTMH: mx.array) -> tuple["ConvolvedCache", Source]:
        """Append T tokens, as the cache that is kept does; the state is replaced by who computes it."""
        kept, source = self.kept.extend(key_BTMH, value_BTMH)
        return ConvolvedCache(kept, self.state), source


class SharedCache(NamedTuple):
    """Number of tokens, for a layer that attends to the keys and values of another layer, or to nothing."""

    length: int

    def extend(self, length: int) -> "SharedCache":
        """Append `length` tokens."""
        return SharedCache(self.length + length)


class RecurrentCache(NamedTuple):
    """Recurrent state after `length` tokens, and the last inputs of the convolutions, one fewer than their width."""

    state_BMGHZ: mx.array
    query_BSMH: mx.array
    key_BSMH: mx.array
    value_BSNZ: mx.array
    length: int

    def extend(
        self,
        state_BMGHZ: mx.array,
        query_BTMH: mx.array,
        key_BTMH: mx.array,
        value_BTNZ: mx.array,
    ) -> "RecurrentCache":
        """Append T tokens, whose state is already computed."""
        return RecurrentCache(
            state_BMGHZ,
            _latest(self.query_BSMH, query_BTMH),
            _latest(self.key_BSMH, key_BTMH),
            _latest(self.value_BSNZ, value_BTNZ),
            self.length + query_BTMH.shape[1],
        )


class StateCache(NamedTuple):
    """Recurrent state after `length` tokens."""

    state_BMGHZ: mx.array
    length: int

    def extend(self, state_BMGHZ: mx.array, length: int) -> "StateCache":
        """Append `length` tokens, whose state is already computed."""
        return StateCache(state_BMGHZ, self.length + length)


class ConvolutionCache(NamedTuple):
    """Last inputs of a convolution after `length` tokens, one fewer than its width."""

    input_BSZ: mx.array
    length: int

    def extend(self, input_BTZ: mx.array) -> "ConvolutionCache":
        """Append T tokens."""
        return ConvolutionCache(_latest(self.input_BSZ, input_BTZ), self.length + input_BTZ.shape[1])


class ScanCache(NamedTuple):
    """State of each channel after `length` tokens, and the last inputs of a convolution, one fewer than its width."""

    state_BFZ: mx.array
    input_BSF: mx.array
    length: int

    def extend(self, state_BFZ: mx.array, input_BTF: mx.array) -> "ScanCache":
        """Append T tokens, whose state is already computed."""
        return ScanCache(state_BFZ, _latest(self.input_BSF, input_BTF), self.length + input_BTF.shape[1])


class LatentCache(NamedTuple):
    """KVCache for latent attention: a latent and one rotated key per token, and an indexer's key if there is one."""

    latent_BSZ: mx.array
    key_BSH: mx.array
    index_key_BSH: mx.array | None
    length: int

    def extend(
        self,
        latent_BTZ: mx.array,
        key_BTH: mx.array,
        index_key_BTH: mx.array | None = None,
    ) -> "LatentCache":
        """Append T tokens, as KVCache.extend does."""
        start = mx.array([self.length])
        index_key_BSH = self.index_key_BSH
        if index_key_BSH is not None:
            assert index_key_BTH is not None
            index_key_BSH = mx.slice_update(index_key_BSH, index_key_BTH, start, (1,))
        return LatentCache(
            mx.slice_update(self.latent_BSZ, latent_BTZ, start, (1,)),
            mx.slice_update(self.key_BSH, key_BTH, start, (1,)),
            index_key_BSH,
            self.length + latent_BTZ.shape[1],
        )


class NGramState(NamedTuple):
    """The last tokens of a sequence, one fewer than an n-gram has, and the last inputs of n-gram embeddings."""

    token_BS: mx.array
    input_BSJD: mx.array

    def extend(self, token_BT: mx.array, input_BTJD: mx.array) -> "NGramState":
        """Append T tokens."""
        return NGramState(_latest(self.token_BS, token_BT), _latest(self.input_BSJD, input_BTJD))


class NGramCache(NamedTuple):
    """Cache of a layer with n-gram embeddings: that of its mixer, and theirs."""

    mixer: "Cache"
    ngrams: NGramState

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.mixer.length


Cache = (
    KVCache
    | RollingCache
    | ConvolvedCache
    | SharedCache
    | LatentCache
    | RecurrentCache
    | StateCache
    | ConvolutionCache
    | ScanCache
    | NGramCache
    | CompressedCache
)


class Caches(NamedTuple):
    """One cache per layer, and the slot at which each row starts, after its left padding; None: all start at 0.

    `spent`: nobody else needs them. A layer's keys and values are then given up when it extends them, so that MLX
    writes in place, even if it starts before the other layers are built.
    """

    layers: list[Cache]
    first_B: mx.array | None
    spent: bool = False

    @property
    def places(self) -> int:
        """Number of filled slots, padding included."""
        return self.layers[0].length


STATES = (
    *(RollingCache, ConvolvedCache, RecurrentCache, StateCache, ConvolutionCache, ScanCache, NGramCache),
    CompressedCache,
)
"""Caches that cannot be cut back to fewer tokens, since they do not keep all."""

States = dict[int, Cache]
"""Caches of this kind, by the index of their layer."""


def states_of(caches: Caches) -> States:
    """Return the caches that cannot be cut back, for `cut_back`. MLX does not write into arrays that are held here."""
    return {index: cache for index, cache in enumerate(caches.layers) if isinstance(cache, STATES)}


def cut_back(caches: Caches, length: int, states: States) -> Caches:
    """Return caches of the first `length` slots, padding included; `states`: those after them."""
    layers: list[Cache] = [
        states[index] if isinstance(cache, STATES) else cache._replace(length=length)
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
                caches.append(SharedCache(0))
            case GroupedQueryAttentionSpec(num_kv_heads=heads, head_dim=head_dim, value_dim=value_dim):
                kept = size if reach is None else min(size, reach)
                key = mx.zeros((batch, kept, heads, head_dim), dtype)
                value = mx.zeros((batch, kept, heads, value_dim), dtype)
                kind = KVCache if reach is None else RollingCache
                cache = kind(key, value, 0)
                if layer.attention.convolution is None:
                    caches.append(cache)
                else:
                    caches.append(ConvolvedCache(cache, empty_convolution_state(layer.attention, batch, dtype)))
            case LatentAttentionSpec(latent_dim=latent_dim, rope_head_dim=rope_head_dim, window=int(window)):
                kept = min(size, window)
                key = mx.zeros((batch, kept, 1, rope_head_dim), dtype)
                caches.append(RollingCache(key, mx.zeros((batch, kept, 1, latent_dim), dtype), 0))
            case LatentAttentionSpec(latent_dim=latent_dim, rope_head_dim=rope_head_dim, indexer=indexer):
                index_key = None if indexer is None else mx.zeros((batch, size, indexer.head_dim), dtype)
                latent = mx.zeros((batch, size, latent_dim), dtype)
                key = mx.zeros((batch, size, rope_head_dim), dtype)
                caches.append(LatentCache(latent, key, index_key, 0))
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
        if layer.ngram_embeddings is not None:
            state = empty_ngram_state(layer.ngram_embeddings, batch, spec.num_streams, spec.embed_dim, dtype)
            caches[-1] = NGramCache(caches[-1], state)
    return caches


def empty_recurrent_cache(spec: GatedDeltaAttentionSpec | Mamba2Spec, batch: int, dtype: mx.Dtype) -> RecurrentCache:
    """Return the cache before the first token: a float32 state of zeros, and zeros as inputs of the convolutions."""
    match spec:
        case GatedDeltaAttentionSpec():
            key_heads, value_heads = spec.num_key_heads, spec.num_value_heads
            key_dim, value_dim = spec.key_head_dim, spec.value_head_dim
        case Mamba2Spec():
            key_heads, value_heads = spec.num_groups, spec.num_heads
            key_dim, value_dim = spec.state_dim, spec.head_dim
        case _:
            assert_never(spec)
    state = (batch, key_heads, value_heads // key_heads, key_dim, value_dim)
    keys = (batch, spec.conv_width - 1, key_heads, key_dim)
    values = (batch, spec.conv_width - 1, value_heads, value_dim)
    return RecurrentCache(
        mx.zeros(state, mx.float32),
        mx.zeros(keys, dtype),
        mx.zeros(keys, dtype),
        mx.zeros(values, dtype),
        0,
    )


def empty_state_cache(spec: LightningAttentionSpec, batch: int) -> StateCache:
    """Return the cache before the first token: a float32 state of zeros."""
    state = (batch, spec.num_heads, 1, spec.head_dim, spec.head_dim)
    return StateCache(mx.zeros(state, mx.float32), 0)


def empty_scan_cache(spec: MambaSpec, batch: int, dtype: mx.Dtype) -> ScanCache:
    """Return the cache before the first token: a float32 state of zeros, and zeros as inputs of the convolution."""
    state = mx.zeros((batch, spec.inner_dim, spec.state_dim), mx.float32)
    return ScanCache(state, mx.zeros((batch, spec.conv_width - 1, spec.inner_dim), dtype), 0)


def empty_convolution_state(spec: GroupedQueryAttentionSpec, batch: int, dtype: mx.Dtype) -> ConvolutionState:
    """Return the state before the first token, of zeros; the layer must have a convolution."""
    assert spec.convolution is not None
    heads = ((spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim))
    widths = (spec.convolution.conv_width - 1, spec.convolution.mix_width - 1)
    inputs = [mx.zeros((batch, width, *shape), dtype) for width in widths for shape in heads]
    return ConvolutionState._make([*inputs, mx.zeros((batch, 1, spec.num_kv_heads * spec.value_dim // 2), dtype)])


def empty_convolution_cache(
    spec: ShortConvolutionSpec, batch: int, embed_dim: int, dtype: mx.Dtype
) -> ConvolutionCache:
    """Return the cache before the first token, with zeros as inputs."""
    return ConvolutionCache(mx.zeros((batch, spec.conv_width - 1, embed_dim), dtype), 0)


def empty_ngram_state(
    spec: NGramEmbeddingsSpec, batch: int, num_streams: int, embed_dim: int, dtype: mx.Dtype
) -> NGramState:
    """Return the state before the first token: contexts of the reset token, and zeros as inputs."""
    token_BS = mx.full((batch, spec.largest - 1), spec.reset_token, mx.int32)
    return NGramState(token_BS, mx.zeros((batch, spec.reach, num_streams, embed_dim), dtype))


def _latest(before: mx.array, new: mx.array) -> mx.array:
    """Return as many of the last inputs as there are `before` [B, S, ...], of those and T newer ones."""
    return mx.concatenate([before, new], axis=1)[:, new.shape[1] :]
