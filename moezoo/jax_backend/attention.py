"""Attention layers. Spec: moezoo.core.reference.attention."""

import math
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moezoo.core.spec import GroupedQueryAttentionSpec, NoPositionSpec, RoPESpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.convolution import ResidualConvolution
from moezoo.jax_backend.convolutional_attention import ConvolvedHeads
from moezoo.jax_backend.dynamic_mask import DynamicMask, keep_greatest
from moezoo.jax_backend.head_router import choose_heads, place_heads
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.kernels.attention import Chunk, attend_in_chunks, chunk_length, uses_chunk_kernel
from moezoo.jax_backend.kv_cache import (
    Attended,
    ConvolutionState,
    ConvolvedCache,
    IndexedCache,
    KeyValueState,
    KVCache,
    RollingCache,
    SharedCache,
    Source,
)
from moezoo.jax_backend.normalization import LayerNorm, RMSNorm, l2_clipped, norm
from moezoo.jax_backend.positions import (
    Documents,
    Relative,
    RelativePosition,
    positions,
    positions_of,
    relative_bias,
    rotate,
    same_document,
    same_side,
    temperature,
)
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.sparse_attention import BlockIndex, BlockIndexer


def attend(
    query_BTMGH: jax.Array,
    key_BSMH: jax.Array,
    value_BSMH: jax.Array,
    mask_TS: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: jax.Array | None = None,
    bias_BNTS: jax.Array | None = None,
    bias_BMS: jax.Array | None = None,
) -> jax.Array:
    """Spec: moezoo.core.reference.attention.attend; the softmax denominator divides the output, not the weights."""
    score = jnp.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH, preferred_element_type=jnp.float32)
    score = score / math.sqrt(query_BTMGH.shape[-1]) if scale is None else score * scale
    if softcap is not None:
        score = softcap * jnp.tanh(score / softcap)
    if bias_BNTS is not None:
        score = score + bias_BNTS.reshape(score.shape)
    if bias_BMS is not None:
        score = score + bias_BMS[:, :, None, None]
    score = jnp.where((mask_TS[:, None] if mask_TS.ndim == 3 else mask_TS)[..., None, :, :], score, -jnp.inf)
    # Subtracting the largest score only guards against overflow; it cancels, and so does its gradient.
    largest = lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True))
    total: jax.Array | float = 0.0
    if sink_N is not None:
        sink_BMGT1 = _sink_logits(sink_N, query_BTMGH.shape[2])
        largest = jnp.maximum(largest, lax.stop_gradient(sink_BMGT1))
        total = jnp.exp(sink_BMGT1 - largest)
    weight = jnp.exp(score - largest)
    total_BTMG1 = jnp.moveaxis(total + jnp.sum(weight, axis=-1, keepdims=True), 3, 1)
    weight = weight.astype(value_BSMH.dtype)
    attended = jnp.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH, preferred_element_type=jnp.float32)
    return (attended / total_BTMG1).astype(value_BSMH.dtype)


def _sink_logits(sink: jax.Array, kv_heads: int) -> jax.Array:
    """Return sinks [N] or [B, T, N] by group of heads: [B, M, G, T, 1], with B and T of one for the former."""
    sink_BNT = sink[None, :, None] if sink.ndim == 1 else sink.swapaxes(1, 2)
    batch, _, length = sink_BNT.shape
    return sink_BNT.reshape(batch, kv_heads, -1, length, 1)


def visible(spec: GroupedQueryAttentionSpec, position_T: jax.Array, position_S: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.attention.visible; for positions [B, T] and [B, S], one mask per row."""
    position_T1, position_1S = position_T[..., :, None], position_S[..., None, :]
    mask_TS = position_T1 >= position_1S
    if spec.window is not None:
        mask_TS = mask_TS & (position_T1 - position_1S < spec.window)
    if spec.chunk is not None:
        mask_TS = mask_TS & (position_T1 // spec.chunk == position_1S // spec.chunk)
    return mask_TS


def attend_causally(
    spec: GroupedQueryAttentionSpec,
    query_BTMGH: jax.Array,
    key_BTMH: jax.Array,
    value_BTMH: jax.Array,
    sink_N: jax.Array | None = None,
    documents: Documents | None = None,
    relative: Relative | None = None,
    bias_BMS: jax.Array | None = None,
    index: BlockIndex | None = None,
) -> jax.Array:
    """Spec: moezoo.core.reference.attention.attend, with the mask of `visible`, in chunks of queries.

    A chunk reads only the keys that one of its queries may attend to.
    """
    length = query_BTMGH.shape[1]
    size, position_T = chunk_length(length), positions(length, 0, None, documents)
    chunks = [
        Chunk(start, min(start + size, length), _first_visible(spec, start, documents))
        for start in range(0, length, size)
    ]

    def mask_of(chunk: Chunk, given: Any) -> jax.Array:
        documents, blocks = given
        position_T = positions(length, 0, None, documents)
        mask_TS = visible(spec, position_T[..., chunk.rows], position_T[..., chunk.seen])
        if documents is not None:
            mask_TS &= same_document(*(documents.document_BT[:, part] for part in (chunk.rows, chunk.seen)))
        return mask_TS if blocks is None else blocks.tokens(mask_TS, chunk.rows)

    def bias_of(chunk: Chunk) -> jax.Array | None:
        return relative_bias(relative, position_T[..., chunk.rows], position_T[..., chunk.seen], chunk.rows)

    blocks = None if index is None else index.chosen([mask_of(chunk, (documents, None)) for chunk in chunks])
    given = documents, blocks
    if uses_chunk_kernel(query_BTMGH.dtype) and spec.plain_scores:
        scale = 1 / math.sqrt(query_BTMGH.shape[-1]) if spec.scale is None else spec.scale
        return attend_in_chunks(chunks, mask_of, scale, query_BTMGH, key_BTMH, value_BTMH, sink_N, given)
    own = [None if bias_BMS is None else bias_BMS[..., chunk.seen] for chunk in chunks]
    attended = [
        attend(
            query_BTMGH[:, chunk.rows],
            key_BTMH[:, chunk.seen],
            value_BTMH[:, chunk.seen],
            keep_greatest(spec.dynamic_mask, bias, mask_of(chunk, given)),
            scale=spec.scale,
            softcap=spec.softcap,
            sink_N=sink_N if sink_N is None or sink_N.ndim == 1 else sink_N[:, chunk.rows],
            bias_BNTS=bias_of(chunk),
            bias_BMS=bias,
        )
        for chunk, bias in zip(chunks, own, strict=True)
    ]
    return jnp.concatenate(attended, axis=1)


def _mask(spec: GroupedQueryAttentionSpec, position_T: jax.Array, position_S: jax.Array) -> jax.Array:
    """Return the mask of tokens at these positions and those: [T, S], or [B, T, S] with padding."""
    return visible(spec, position_T, position_S) & same_side(position_T, position_S)


def _first_visible(spec: GroupedQueryAttentionSpec, position: int, documents: Documents | None) -> int:
    """Return the first slot that a query at this slot, or at a later one, may attend to.

    In documents, which begin at any slot, so do their chunks.
    """
    if spec.window is not None:
        return max(0, position - spec.window + 1)
    if spec.chunk is not None and documents is not None:
        return max(0, position - spec.chunk + 1)
    return 0 if spec.chunk is None else position // spec.chunk * spec.chunk


class GroupedQueryAttention(nnx.Module):
    """Spec: moezoo.core.reference.attention.grouped_query_attention; with a cache, for the next tokens."""

    def __init__(self, spec: GroupedQueryAttentionSpec, weights: Weights, layer: int):
        self.spec, self.layer = spec, layer
        self.w_query = weights.parameter("w_query")
        own_keys = spec.keys_of_layer is None
        if own_keys:
            self.w_key = weights.parameter("w_key")
        own_values = own_keys and not spec.values_from_keys and spec.convolution is None
        if own_values:
            self.w_value = weights.parameter("w_value")
        self.w_output = weights.parameter("w_output")
        if spec.qkv_bias:
            self.b_query = weights.parameter("b_query")
            if own_keys:
                self.b_key = weights.parameter("b_key")
            if own_values:
                self.b_value = weights.parameter("b_value")
        if spec.convolution is not None:
            self.convolution = ConvolvedHeads(spec, weights.inside("convolution"))
        if spec.key_temperature:
            self.key_temperature = weights.parameter("key_temperature")
        if spec.value_norm is not None:
            self.value_norm = norm(spec.value_norm, weights.inside("value_norm"))
        if spec.qk_norm is not None:
            axes = 1 if spec.qk_norm_over == "head" else 2
            self.query_norm = norm(spec.qk_norm, weights.inside("query_norm"), axes)
            if own_keys:
                self.key_norm = norm(spec.qk_norm, weights.inside("key_norm"), axes)
        if spec.indexer is not None:
            self.indexer = BlockIndexer(spec.indexer, spec.position, spec.head_dim, weights.inside("indexer"))
        if spec.dynamic_mask is not None:
            self.dynamic_mask = DynamicMask(weights.inside("dynamic_mask"))
        if spec.value_residual and layer > 0:
            self.value_mix = weights.parameter("value_mix")
        if spec.qk_l2_clip is not None:
            self.query_scale = weights.parameter("query_scale")
        if spec.kv_convolution is not None:
            self.key_convolution = ResidualConvolution(spec.kv_convolution, weights.inside("key_convolution"))
            self.value_convolution = ResidualConvolution(spec.kv_convolution, weights.inside("value_convolution"))
        if spec.sinks:
            self.sink = weights.parameter("sink")
        if spec.projected_sinks:
            self.w_sink = weights.parameter("w_sink")
        if spec.relative is not None:
            self.relative = RelativePosition(spec.relative, weights.inside("relative"))
        if spec.gate is not None:
            self.w_gate = weights.parameter("w_gate")
        if spec.gate_bias is not None:
            self.b_gate = weights.parameter("b_gate")
        if spec.output_bias:
            self.b_output = weights.parameter("b_output")

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | RollingCache | ConvolvedCache | IndexedCache | SharedCache | None = None,
        *,
        first_value_BTMH: jax.Array | None = None,
        first_B: jax.Array | None = None,
        source: Source | None = None,
        documents: Documents | None = None,
        routing: Routing | None = None,
        key_value_BTD: tuple[jax.Array, jax.Array] | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        spec, dtype = self.spec, x_BTD.dtype
        batch, length = x_BTD.shape[:2]
        position_T = positions(length, 0 if cache is None else cache.length, first_B, documents)
        past = cache.state if isinstance(cache, ConvolvedCache) else None
        real_BT = None if first_B is None else position_T >= 0
        query, key, value, state = self._projected(x_BTD, past, real_BT, documents, key_value_BTD)
        if isinstance(cache, ConvolvedCache):
            cache = cache._replace(state=state)
        scale_NH = None if spec.qk_l2_clip is None else self.query_scale[...]
        query = self._rotated(query, None if spec.qk_norm is None else self.query_norm, position_T, scale_NH)
        query = self._tempered(query, position_T)
        index, cache = self.indexer(x_BTD, position_T, cache, first_B, documents) if spec.indexer else (None, cache)
        if isinstance(cache, SharedCache):
            cache = cache.extend(length)
        elif key is not None and value is not None:
            key, value = self._keys_and_values(key, value, position_T)
            mixed = value
            if spec.value_residual and self.layer > 0:
                assert first_value_BTMH is not None
                mix = self.value_mix[...].astype(jnp.float32)
                mixed = ((1 - mix) * value + mix * first_value_BTMH).astype(dtype)
            if cache is None:
                source = Source(key, mixed, position_T)
            else:
                cache, source = cache.extend(key, mixed)
        assert source is not None
        sink_N, relative = self._sinks(x_BTD), self._relative(x_BTD, position_T)
        bias_BMS = None if spec.dynamic_mask is None else self.dynamic_mask(source[1])
        grouped = choose_heads(query.reshape(batch, length, spec.num_kv_heads, -1, spec.head_dim), routing)
        if cache is None:
            attended = attend_causally(spec, grouped, *source[:2], sink_N, documents, relative, bias_BMS, index)
        else:
            position_S = positions_of(source.slot_S, first_B)
            mask_TS, bias = _mask(spec, position_T, position_S), relative_bias(relative, position_T, position_S)
            mask_TS = mask_TS if index is None else index.chosen([mask_TS]).tokens(mask_TS)
            mask_TS = keep_greatest(spec.dynamic_mask, bias_BMS, mask_TS, position_S)
            options: dict[str, Any] = {"scale": spec.scale, "softcap": spec.softcap, "sink_N": sink_N}
            attended = attend(grouped, *source[:2], mask_TS, **options, bias_BNTS=bias, bias_BMS=bias_BMS)
        attended = self._gated(place_heads(attended, routing).reshape(*query.shape[:3], spec.value_dim), x_BTD)
        output = projection.einsum("BTNH,NHD->BTD", attended, self.w_output[...].astype(dtype))
        if spec.output_bias:
            output = output + self.b_output[...].astype(dtype)
        return Attended(output, cache, value, None, source if spec.keys_of_layer is None else None)

    def _tempered(self, feature: jax.Array, position_T: jax.Array) -> jax.Array:
        """Multiply features [B, T, N, H] by the temperature of their position, if there is one."""
        if self.spec.temperature_tuning is None:
            return feature
        temperature_T = temperature(self.spec.temperature_tuning, jnp.maximum(position_T, 0))
        return (feature * temperature_T[..., None, None]).astype(feature.dtype)

    def _sinks(self, x_BTD: jax.Array) -> jax.Array | None:
        """Return the sinks in float32: [N], or [B, T, N] where they are a projection; None: there are none."""
        if self.spec.projected_sinks:
            return projection.einsum("BTD,DN->BTN", x_BTD, self.w_sink[...].astype(x_BTD.dtype)).astype(jnp.float32)
        return self.sink[...].astype(jnp.float32) if self.spec.sinks else None

    def _relative(self, x_BTD: jax.Array, position_T: jax.Array) -> Relative | None:
        """Return features and profiles of relative position logits, if there are any."""
        if self.spec.relative is None:
            return None
        feature_BTNZ, profile_ZS = self.relative(x_BTD)
        return Relative(self._tempered(feature_BTNZ, position_T), profile_ZS)

    def _projected(
        self,
        x_BTD: jax.Array,
        past: ConvolutionState | KeyValueState | None,
        real_BT: jax.Array | None,
        documents: Documents | None,
        key_value_BTD: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None, Any]:
        """Spec: moezoo.core.reference.attention._projected; with the state of the convolution, None without one."""
        spec, dtype = self.spec, x_BTD.dtype
        query = projection.einsum("BTD,DNH->BTNH", x_BTD, self.w_query[...].astype(dtype))
        if spec.qkv_bias:
            query = query + self.b_query[...].astype(dtype)
        if spec.keys_of_layer is not None:
            return query, None, None, None
        key_BTD, value_BTD = (x_BTD, x_BTD) if key_value_BTD is None else key_value_BTD
        key = projection.einsum("BTD,DMH->BTMH", key_BTD, self.w_key[...].astype(dtype))
        if spec.qkv_bias:
            key = key + self.b_key[...].astype(dtype)
        if spec.convolution is not None:
            assert not isinstance(past, KeyValueState)
            convolved: tuple[jax.Array, jax.Array, jax.Array, ConvolutionState]
            convolved = self.convolution(x_BTD, query, key, past, real_BT, documents)
            return convolved
        if spec.values_from_keys:
            return query, key, key, None
        value = projection.einsum("BTD,DMH->BTMH", value_BTD, self.w_value[...].astype(dtype))
        value = value + self.b_value[...].astype(dtype) if spec.qkv_bias else value
        if spec.kv_convolution is None:
            return query, key, value, None
        inputs = past if isinstance(past, KeyValueState) else KeyValueState(None, None)
        options: dict[str, Any] = {"real_BT": real_BT, "documents": documents}
        key, of_key = self.key_convolution(key, key_BTD, inputs.key_BSMH, **options)
        value, of_value = self.value_convolution(value, value_BTD, inputs.value_BSMH, **options)
        return query, key, value, KeyValueState(of_key, of_value)

    def _keys_and_values(self, key: jax.Array, value: jax.Array, position_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return keys after norm and rotation, and values before any value residual."""
        spec, dtype = self.spec, key.dtype
        if spec.value_norm is not None:
            value = self.value_norm(value)
        value = self._clipped(value)
        if spec.value_multiplier != 1:
            value = (value.astype(jnp.float32) * spec.value_multiplier).astype(dtype)
        key = self._rotated(key, None if spec.qk_norm is None else self.key_norm, position_T)
        if spec.key_temperature:
            key = (key * self.key_temperature[...].astype(jnp.float32)[:, None]).astype(dtype)
        return key, value

    def _rotated(
        self,
        x: jax.Array,
        norm: RMSNorm | LayerNorm | None,
        position_T: jax.Array,
        scale_NH: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize, clip and rotate queries or keys; a scale multiplies queries before an L2 clip."""
        spec = self.spec
        if norm is not None and not spec.qk_norm_after_rotation:
            x = norm(x)
        if spec.qk_l2_clip is not None:
            dtype, x = x.dtype, x.astype(jnp.float32)
            x = x if scale_NH is None else x * scale_NH.astype(jnp.float32)
            x = l2_clipped(x, spec.qk_l2_clip).astype(dtype)
        x = self._clipped(x)
        match spec.position:
            case RoPESpec():
                x = rotate(spec.position, x, position_T)
            case NoPositionSpec():
                pass
            case _:
                assert_never(spec.position)
        return norm(x) if norm is not None and spec.qk_norm_after_rotation else x

    def _clipped(self, x: jax.Array) -> jax.Array:
        clip = self.spec.clip
        return x if clip is None else jnp.clip(x, -clip, clip)

    def _gated(self, attended_BTNH: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Multiply the output of the heads by the sigmoid or softplus gate of the layer's input, if there is one."""
        match self.spec.gate:
            case "headwise":
                gate = projection.einsum("BTD,DN->BTN", x_BTD, self.w_gate[...].astype(x_BTD.dtype))[..., None]
            case "elementwise":
                gate = projection.einsum("BTD,DNH->BTNH", x_BTD, self.w_gate[...].astype(x_BTD.dtype))
            case None:
                return attended_BTNH
            case _:
                assert_never(self.spec.gate)
        gate = gate.astype(jnp.float32)
        if self.spec.gate_bias is not None:
            gate = gate + self.b_gate[...].astype(jnp.float32).reshape(self.spec.num_heads, -1)
        gate = jax.nn.softplus(gate) if self.spec.gate_function == "softplus" else jax.nn.sigmoid(gate)
        return (attended_BTNH * gate).astype(attended_BTNH.dtype)
