"""Caches of fixed size: recurrent states, and the last inputs of convolutions."""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from moezoo.core.spec import (
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    NGramEmbeddingsSpec,
    ShortConvolutionSpec,
)


class ConvolutionState(NamedTuple):
    """The last inputs of the two convolutions of queries and keys, and delayed values of the last token."""

    query_BSNH: jax.Array
    key_BSMH: jax.Array
    filtered_query_BSNH: jax.Array
    filtered_key_BSMH: jax.Array
    value_BSZ: jax.Array

    def extend(self, *new: jax.Array) -> "ConvolutionState":
        """Append T tokens, given in the order of the fields."""
        return ConvolutionState._make(_latest(before, own) for before, own in zip(self, new, strict=True))


class KeyValueState(NamedTuple):
    """The last inputs of the short convolutions of keys and of values; None before the first token."""

    key_BSMH: jax.Array | None
    value_BSMH: jax.Array | None


class RecurrentCache(NamedTuple):
    """Recurrent state after `length` tokens, and the last inputs of the convolutions, one fewer than their width."""

    state_BMGHZ: jax.Array
    query_BSMH: jax.Array
    key_BSMH: jax.Array
    value_BSNZ: jax.Array
    length: jax.Array

    def extend(
        self,
        state_BMGHZ: jax.Array,
        query_BTMH: jax.Array,
        key_BTMH: jax.Array,
        value_BTNZ: jax.Array,
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

    state_BMGHZ: jax.Array
    length: jax.Array

    def extend(self, state_BMGHZ: jax.Array, length: int) -> "StateCache":
        """Append `length` tokens, whose state is already computed."""
        return StateCache(state_BMGHZ, self.length + length)


class ConvolutionCache(NamedTuple):
    """Last inputs of a convolution after `length` tokens, one fewer than its width."""

    input_BSZ: jax.Array
    length: jax.Array

    def extend(self, input_BTZ: jax.Array) -> "ConvolutionCache":
        """Append T tokens."""
        return ConvolutionCache(_latest(self.input_BSZ, input_BTZ), self.length + input_BTZ.shape[1])


class ScanCache(NamedTuple):
    """State of each channel after `length` tokens, and the last inputs of a convolution, one fewer than its width."""

    state_BFZ: jax.Array
    input_BSF: jax.Array
    length: jax.Array

    def extend(self, state_BFZ: jax.Array, input_BTF: jax.Array) -> "ScanCache":
        """Append T tokens, whose state is already computed."""
        return ScanCache(state_BFZ, _latest(self.input_BSF, input_BTF), self.length + input_BTF.shape[1])


class NGramState(NamedTuple):
    """The last tokens of a sequence, one fewer than an n-gram has, and the last inputs of n-gram embeddings."""

    token_BS: jax.Array
    input_BSJD: jax.Array

    def extend(self, token_BT: jax.Array, input_BTJD: jax.Array) -> "NGramState":
        """Append T tokens."""
        return NGramState(_latest(self.token_BS, token_BT), _latest(self.input_BSJD, input_BTJD))


def empty_recurrent_cache(spec: GatedDeltaAttentionSpec | Mamba2Spec, batch: int, dtype: jnp.dtype) -> RecurrentCache:
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
        jnp.zeros(state, jnp.float32),
        jnp.zeros(keys, dtype),
        jnp.zeros(keys, dtype),
        jnp.zeros(values, dtype),
        jnp.zeros((), jnp.int32),
    )


def empty_state_cache(spec: LightningAttentionSpec, batch: int) -> StateCache:
    """Return the cache before the first token: a float32 state of zeros."""
    state = (batch, spec.num_heads, 1, spec.head_dim, spec.head_dim)
    return StateCache(jnp.zeros(state, jnp.float32), jnp.zeros((), jnp.int32))


def empty_scan_cache(spec: MambaSpec, batch: int, dtype: jnp.dtype) -> ScanCache:
    """Return the cache before the first token: a float32 state of zeros, and zeros as inputs of the convolution."""
    state = jnp.zeros((batch, spec.inner_dim, spec.state_dim), jnp.float32)
    return ScanCache(state, jnp.zeros((batch, spec.conv_width - 1, spec.inner_dim), dtype), jnp.zeros((), jnp.int32))


def empty_convolution_state(spec: GroupedQueryAttentionSpec, batch: int, dtype: jnp.dtype) -> ConvolutionState:
    """Return the state before the first token, of zeros; the layer must have a convolution."""
    assert spec.convolution is not None
    heads = ((spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim))
    widths = (spec.convolution.conv_width - 1, spec.convolution.mix_width - 1)
    inputs = [jnp.zeros((batch, width, *shape), dtype) for width in widths for shape in heads]
    return ConvolutionState._make([*inputs, jnp.zeros((batch, 1, spec.num_kv_heads * spec.value_dim // 2), dtype)])


def empty_convolution_cache(
    spec: ShortConvolutionSpec, batch: int, embed_dim: int, dtype: jnp.dtype
) -> ConvolutionCache:
    """Return the cache before the first token, with zeros as inputs."""
    return ConvolutionCache(jnp.zeros((batch, spec.conv_width - 1, embed_dim), dtype), jnp.zeros((), jnp.int32))


def empty_ngram_state(
    spec: NGramEmbeddingsSpec, batch: int, num_streams: int, embed_dim: int, dtype: jnp.dtype
) -> NGramState:
    """Return the state before the first token: contexts of the reset token, and zeros as inputs."""
    token_BS = jnp.full((batch, spec.largest - 1), spec.reset_token, jnp.int32)
    return NGramState(token_BS, jnp.zeros((batch, spec.reach, num_streams, embed_dim), dtype))


def empty_key_value_state(spec: GroupedQueryAttentionSpec, batch: int, dtype: jnp.dtype) -> KeyValueState:
    """Return the state before the first token: zeros as inputs of the convolutions of keys and of values."""
    assert spec.kv_convolution is not None
    shape = (batch, spec.kv_convolution.width - 1, spec.num_kv_heads)
    return KeyValueState(jnp.zeros((*shape, spec.head_dim), dtype), jnp.zeros((*shape, spec.value_dim), dtype))


def _latest(before: jax.Array, new: jax.Array) -> jax.Array:
    """Return as many of the last inputs as there are `before` [B, S, ...], of those and T newer ones."""
    return jnp.concatenate([before, new], axis=1)[:, new.shape[1] :]
