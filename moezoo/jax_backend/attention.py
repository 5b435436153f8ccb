"""Attention layers. Spec: moezoo.core.reference.attention."""

import math
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import GroupedQueryAttentionSpec, NoPositionSpec, RoPESpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kv_cache import KVCache
from moezoo.jax_backend.normalization import RMSNorm
from moezoo.jax_backend.positions import rotate


def attend(query_BTMGH: jax.Array, key_BSMH: jax.Array, value_BSMH: jax.Array, mask_TS: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.attention.attend."""
    score = jnp.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH, preferred_element_type=jnp.float32)
    score = jnp.where(mask_TS, score / math.sqrt(query_BTMGH.shape[-1]), -jnp.inf)
    weight = jax.nn.softmax(score, axis=-1).astype(value_BSMH.dtype)
    return jnp.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH)


class GroupedQueryAttention(nnx.Module):
    """Spec: moezoo.core.reference.attention.grouped_query_attention; with a cache, for the tokens that follow it."""

    def __init__(self, spec: GroupedQueryAttentionSpec, weights: Weights):
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
            self.query_norm = RMSNorm(spec.qk_norm, weights.inside("query_norm"))
            self.key_norm = RMSNorm(spec.qk_norm, weights.inside("key_norm"))
        if spec.output_bias:
            self.b_output = weights.parameter("b_output")

    def __call__(self, x_BTD: jax.Array, cache: KVCache | None = None) -> tuple[jax.Array, KVCache | None]:
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
            case RoPESpec(base=base):
                query, key = rotate(query, position_T, base), rotate(key, position_T, base)
            case NoPositionSpec():
                pass
            case _:
                assert_never(spec.position)
        if cache is not None:
            cache = cache.extended(key, value)
            key, value = cache.key_BSMH, cache.value_BSMH
        mask_TS = position_T[:, None] >= jnp.arange(key.shape[1])[None, :]
        grouped = query.reshape(batch, length, spec.num_kv_heads, -1, spec.head_dim)
        attended = attend(grouped, key, value, mask_TS).reshape(batch, length, spec.num_heads, spec.head_dim)
        output = jnp.einsum("BTNH,NHD->BTD", attended, self.w_output[...].astype(dtype))
        if spec.output_bias:
            output = output + self.b_output[...].astype(dtype)
        return output, cache
