"""Attention layers. Spec: moezoo.core.reference.attention."""

import math
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moezoo.core.spec import GroupedQueryAttentionSpec, NoPositionSpec, RoPESpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kv_cache import Attended, KVCache
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.positions import rotate


def attend(query_BTMGH: jax.Array, key_BSMH: jax.Array, value_BSMH: jax.Array, mask_TS: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.attention.attend; divides by the softmax's denominator after the second product."""
    score = jnp.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH, preferred_element_type=jnp.float32)
    score = jnp.where(mask_TS, score / math.sqrt(query_BTMGH.shape[-1]), -jnp.inf)
    # The largest score only guards against overflow; it cancels, and so does its gradient.
    weight = jnp.exp(score - lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True)))
    total_BTMG1 = jnp.moveaxis(jnp.sum(weight, axis=-1, keepdims=True), 3, 1)
    weight = weight.astype(value_BSMH.dtype)
    attended = jnp.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH, preferred_element_type=jnp.float32)
    return (attended / total_BTMG1).astype(value_BSMH.dtype)


def attend_causally(query_BTMGH: jax.Array, key_BTMH: jax.Array, value_BTMH: jax.Array) -> jax.Array:
    """`attend` of each token to itself and those before it, in chunks of queries that see only the keys they need.

    On the CPU a chunk's scores stay in cache, which is four times faster at T = 384 (writings/performance.md).
    """
    length = query_BTMGH.shape[1]
    chunk = 64 if jax.default_backend() == "cpu" else length
    position_T = jnp.arange(length)
    attended = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        mask_TS = position_T[start:end, None] >= position_T[None, :end]
        attended.append(attend(query_BTMGH[:, start:end], key_BTMH[:, :end], value_BTMH[:, :end], mask_TS))
    return jnp.concatenate(attended, axis=1)


class GroupedQueryAttention(nnx.Module):
    """Spec: moezoo.core.reference.attention.grouped_query_attention; with a cache, for the tokens that follow it."""

    def __init__(self, spec: GroupedQueryAttentionSpec, weights: Weights, layer: int):
        self.spec = spec
        self.w_query = weights.parameter("w_query")
        self.w_key = weights.parameter("w_key")
        self.w_value = weights.parameter("w_value")
        self.w_output = weights.parameter("w_output")
        if spec.qkv_bias:
            self.b_query = weights.parameter("b_query")
            self.b_key = weights.parameter("b_key")
            self.b_value = weights.parameter("b_value")
        if spec.qk_norm is not None:
            self.query_norm = norm(spec.qk_norm, weights.inside("query_norm"))
            self.key_norm = norm(spec.qk_norm, weights.inside("key_norm"))
        if spec.output_bias:
            self.b_output = weights.parameter("b_output")

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None = None,
        *,
        first_value_BTMH: jax.Array | None = None,
        count: jax.Array | int | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; the first `count` of them are kept there (None: all)."""
        spec, dtype = self.spec, x_BTD.dtype
        query = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.w_query[...].astype(dtype))
        key = jnp.einsum("BTD,DMH->BTMH", x_BTD, self.w_key[...].astype(dtype))
        value = jnp.einsum("BTD,DMH->BTMH", x_BTD, self.w_value[...].astype(dtype))
        if spec.qkv_bias:
            query = query + self.b_query[...].astype(dtype)
            key = key + self.b_key[...].astype(dtype)
            value = value + self.b_value[...].astype(dtype)
        if spec.qk_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        batch, length = x_BTD.shape[:2]
        position_T = jnp.arange(length) + (0 if cache is None else cache.length)
        match spec.position:
            case RoPESpec():
                query, key = rotate(spec.position, query, position_T), rotate(spec.position, key, position_T)
            case NoPositionSpec():
                pass
            case _:
                assert_never(spec.position)
        grouped = query.reshape(batch, length, spec.num_kv_heads, -1, spec.head_dim)
        if cache is None:
            attended = attend_causally(grouped, key, value)
        else:
            cache = cache.extended(key, value, count)
            mask_TS = position_T[:, None] >= jnp.arange(cache.key_BSMH.shape[1])[None, :]
            attended = attend(grouped, cache.key_BSMH, cache.value_BSMH, mask_TS)
        attended = attended.reshape(batch, length, spec.num_heads, spec.head_dim)
        output = jnp.einsum("BTNH,NHD->BTD", attended, self.w_output[...].astype(dtype))
        if spec.output_bias:
            output = output + self.b_output[...].astype(dtype)
        return Attended(output, cache, value, None)
