"""Attention layers. Spec: moezoo.core.reference.attention."""

import math
from typing import assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import GroupedQueryAttentionSpec, NoPositionSpec, RoPESpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kv_cache import Attended, KVCache
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import rotate
from moezoo.mlx_backend.streams import streams


def attend(query_BTMGH: mx.array, key_BSMH: mx.array, value_BSMH: mx.array, mask_TS: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.attention.attend, by MLX's fused kernel, which groups heads alike."""
    dtype = query_BTMGH.dtype
    if mx.default_device() == mx.Device(mx.cpu):
        # Trap: without a kernel the scores would be rounded to the dtype of the inputs.
        query_BTMGH, key_BSMH, value_BSMH = (x.astype(mx.float32) for x in (query_BTMGH, key_BSMH, value_BSMH))
    batch, length, kv_heads, group, head_dim = query_BTMGH.shape
    query_BNTH = query_BTMGH.reshape(batch, length, kv_heads * group, head_dim).swapaxes(1, 2)
    attended_BNTH = mx.fast.scaled_dot_product_attention(
        query_BNTH,
        key_BSMH.swapaxes(1, 2),
        value_BSMH.swapaxes(1, 2),
        scale=1 / math.sqrt(head_dim),
        mask=mask_TS,
    )
    return attended_BNTH.swapaxes(1, 2).reshape(query_BTMGH.shape).astype(dtype)


def attend_causally(query_BTMGH: mx.array, key_BTMH: mx.array, value_BTMH: mx.array) -> mx.array:
    """`attend` of each token to itself and those before it, in chunks of queries that see only the keys they need.

    On the CPU that saves half of the exponentials, and chunks take turns on two streams, each of which has a thread.
    The GPU has a fused kernel for the whole.
    """
    length = query_BTMGH.shape[1]
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    chunk = 64 if on_cpu else length
    turns = streams()
    position_T = mx.arange(length)
    attended = []
    for index, start in enumerate(range(0, length, chunk)):
        end = min(start + chunk, length)
        mask_TS = position_T[start:end, None] >= position_T[None, :end]
        with mx.stream(turns[index % len(turns)]):
            attended.append(attend(query_BTMGH[:, start:end], key_BTMH[:, :end], value_BTMH[:, :end], mask_TS))
    return mx.concatenate(attended, axis=1)


class GroupedQueryAttention(nn.Module):
    """Spec: moezoo.core.reference.attention.grouped_query_attention; with a cache, for the tokens that follow it."""

    def __init__(self, spec: GroupedQueryAttentionSpec, weights: Weights, layer: int):
        super().__init__()
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
        x_BTD: mx.array,
        cache: KVCache | None = None,
        *,
        first_value_BTMH: mx.array | None = None,
        count: int | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; the first `count` of them are kept there (None: all)."""
        spec, dtype = self.spec, x_BTD.dtype
        query = mx.einsum("BTD,DNH->BTNH", x_BTD, self.w_query.astype(dtype))
        key = mx.einsum("BTD,DMH->BTMH", x_BTD, self.w_key.astype(dtype))
        value = mx.einsum("BTD,DMH->BTMH", x_BTD, self.w_value.astype(dtype))
        if spec.qkv_bias:
            query = query + self.b_query.astype(dtype)
            key = key + self.b_key.astype(dtype)
            value = value + self.b_value.astype(dtype)
        if spec.qk_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        batch, length = x_BTD.shape[:2]
        position_T = mx.arange(length) + (0 if cache is None else cache.length)
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
            mask_TS = position_T[:, None] >= mx.arange(cache.key_BSMH.shape[1])[None, :]
            attended = attend(grouped, cache.key_BSMH, cache.value_BSMH, mask_TS)
        attended = attended.reshape(batch, length, spec.num_heads, spec.head_dim)
        output = mx.einsum("BTNH,NHD->BTD", attended, self.w_output.astype(dtype))
        if spec.output_bias:
            output = output + self.b_output.astype(dtype)
        return Attended(output, cache, value, None)
