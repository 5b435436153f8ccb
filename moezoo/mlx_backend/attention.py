"""Attention layers. Spec: moezoo.core.reference.attention."""

import math
from typing import Any, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import GroupedQueryAttentionSpec, NoPositionSpec, RoPESpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.convolution import ResidualConvolution
from moezoo.mlx_backend.convolutional_attention import ConvolvedHeads
from moezoo.mlx_backend.dynamic_mask import DynamicMask, keep_greatest
from moezoo.mlx_backend.head_router import choose_heads, place_heads
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.attention import Chunk, attend_chunks, attend_fused, chunk_length
from moezoo.mlx_backend.kv_cache import (
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
from moezoo.mlx_backend.normalization import LayerNorm, RMSNorm, l2_clipped, norm
from moezoo.mlx_backend.positions import (
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
from moezoo.mlx_backend.routing import Routing
from moezoo.mlx_backend.sparse_attention import BlockIndex, BlockIndexer


def attend(
    query_BTMGH: mx.array,
    key_BSMH: mx.array,
    value_BSMH: mx.array,
    mask_TS: mx.array | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: mx.array | None = None,
    bias_BNTS: mx.array | None = None,
    bias_BMS: mx.array | None = None,
) -> mx.array:
    """Spec: moezoo.core.reference.attention.attend; with MLX's fused kernel, if that can.

    Without a mask every query attends to all keys.
    """
    dtype, kv_heads = query_BTMGH.dtype, key_BSMH.shape[2]
    scale = 1 / math.sqrt(query_BTMGH.shape[-1]) if scale is None else scale
    if softcap is None and bias_BNTS is None and bias_BMS is None and (sink_N is None or sink_N.ndim == 1):
        return attend_fused(query_BTMGH, key_BSMH, value_BSMH, mask_TS, scale, sink_N)
    query_BTMGH, key_BSMH, value_BSMH = (x.astype(mx.float32) for x in (query_BTMGH, key_BSMH, value_BSMH))
    score = mx.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH) * scale
    score = score if softcap is None else softcap * mx.tanh(score / softcap)
    if bias_BNTS is not None:
        score = score + bias_BNTS.reshape(score.shape)
    if bias_BMS is not None:
        score = score + bias_BMS[:, :, None, None]
    if mask_TS is not None:
        score = mx.where((mask_TS[:, None] if mask_TS.ndim == 3 else mask_TS)[..., None, :, :], score, -mx.inf)
    if sink_N is not None:
        sink_BMGT1 = mx.broadcast_to(_sink_logits(sink_N, kv_heads), (*score.shape[:-1], 1))
        score = mx.concatenate([score, sink_BMGT1], axis=-1)
    weight = mx.softmax(score, axis=-1)[..., : key_BSMH.shape[1]]
    return mx.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH).astype(dtype)


def _sink_logits(sink: mx.array, kv_heads: int) -> mx.array:
    """Return sinks [N] or [B, T, N] by group of heads: [B, M, G, T, 1], with B and T of one for the former."""
    sink_BNT = sink[None, :, None] if sink.ndim == 1 else sink.swapaxes(1, 2)
    batch, _, length = sink_BNT.shape
    return sink_BNT.reshape(batch, kv_heads, -1, length, 1)


def visible(spec: GroupedQueryAttentionSpec, position_T: mx.array, position_S: mx.array) -> mx.array:
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
    query_BTMGH: mx.array,
    key_BTMH: mx.array,
    value_BTMH: mx.array,
    sink_N: mx.array | None = None,
    documents: Documents | None = None,
    relative: Relative | None = None,
    bias_BMS: mx.array | None = None,
    index: BlockIndex | None = None,
) -> mx.array:
    """Spec: moezoo.core.reference.attention.attend, with the mask of `visible`, in chunks of queries.

    A chunk reads only the keys that one of its queries may attend to. On the CPU that saves half of the exponentials,
    and chunks alternate between two streams, each with its own thread. The GPU has a fused kernel for all at once.
    """
    length = query_BTMGH.shape[1]
    size, position = chunk_length(length), positions(length, 0, None, documents)
    chunks, masks = [], []
    for start in range(0, length, size):
        end, first = min(start + size, length), _first_visible(spec, start, documents)
        masks.append(visible(spec, position[..., start:end], position[..., first:end]))
        if documents is not None:
            masks[-1] &= same_document(documents.document_BT[:, start:end], documents.document_BT[:, first:end])
        chunks.append(Chunk(start, end, first, end, masks[-1]))
    if index is not None:
        blocks = index.chosen(masks)
        chunks = [Chunk(*each[:4], blocks.tokens(own, each.rows)) for each, own in zip(chunks, masks, strict=True)]
    scale = 1 / math.sqrt(query_BTMGH.shape[-1]) if spec.scale is None else spec.scale

    def attend_chunk(chunk: Chunk) -> mx.array:
        rows, seen = chunk.rows, chunk.seen
        query, key, value = query_BTMGH[:, rows], key_BTMH[:, seen], value_BTMH[:, seen]
        own_sink = sink_N if sink_N is None or sink_N.ndim == 1 else sink_N[:, rows]
        bias = relative_bias(relative, position[..., rows], position[..., seen], rows)
        of_key = None if bias_BMS is None else bias_BMS[..., seen]
        mask_TS = keep_greatest(spec.dynamic_mask, of_key, chunk.mask_TS)
        options: dict[str, Any] = {"scale": scale, "softcap": spec.softcap, "sink_N": own_sink}
        return attend(query, key, value, mask_TS, **options, bias_BNTS=bias, bias_BMS=of_key)

    plain = spec.plain_scores
    return attend_chunks(attend_chunk, query_BTMGH, key_BTMH, value_BTMH, chunks, scale, sink_N, plain=plain)


def _mask(spec: GroupedQueryAttentionSpec, position_T: mx.array, position_S: mx.array) -> mx.array | None:
    """Return the mask of tokens at these positions and those: [T, S], [B, T, S] with padding, or None.

    None means that every token attends to every slot.
    """
    limits = (spec.window, spec.chunk, spec.indexer, spec.dynamic_mask)
    everything = all(limit is None for limit in limits)
    if position_T.shape == (1,) and everything:
        return None  # one new token, which attends to all slots: without window and chunk the cache does not roll
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


class GroupedQueryAttention(nn.Module):
    """Spec: moezoo.core.reference.attention.grouped_query_attention; with a cache, for the next tokens."""

    def __init__(self, spec: GroupedQueryAttentionSpec, weights: Weights, layer: int):
        super().__init__()
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
        x_BTD: mx.array,
        cache: KVCache | RollingCache | ConvolvedCache | IndexedCache | SharedCache | None = None,
        *,
        first_value_BTMH: mx.array | None = None,
        first_B: mx.array | None = None,
        source: Source | None = None,
        documents: Documents | None = None,
        routing: Routing | None = None,
        key_value_BTD: tuple[mx.array, mx.array] | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        spec, dtype = self.spec, x_BTD.dtype
        batch, length = x_BTD.shape[:2]
        cached = 0 if cache is None else cache.length
        position_T = positions(length, cached, first_B, documents)
        is_known = first_B is None and documents is None
        known_T = range(cached, cached + length) if is_known else position_T
        past = cache.state if isinstance(cache, ConvolvedCache) else None
        real_BT = None if first_B is None else position_T >= 0
        query, key, value, state = self._projected(x_BTD, past, real_BT, documents, key_value_BTD)
        if isinstance(cache, ConvolvedCache):
            cache = cache._replace(state=state)
        scale_NH = None if spec.qk_l2_clip is None else self.query_scale
        query = self._rotated(query, None if spec.qk_norm is None else self.query_norm, known_T, scale_NH)
        query = self._tempered(query, position_T)
        index, cache = self.indexer(x_BTD, position_T, cache, first_B, documents) if spec.indexer else (None, cache)
        if isinstance(cache, SharedCache):
            cache = cache.extend(length)
        elif key is not None and value is not None:
            key, value = self._keys_and_values(key, value, known_T)
            mixed = value
            if spec.value_residual and self.layer > 0:
                assert first_value_BTMH is not None
                mix = self.value_mix.astype(mx.float32)
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
            if index is not None and mask_TS is not None:
                mask_TS = index.chosen([mask_TS]).tokens(mask_TS)
            mask_TS = keep_greatest(spec.dynamic_mask, bias_BMS, mask_TS, position_S)
            options: dict[str, Any] = {"scale": spec.scale, "softcap": spec.softcap, "sink_N": sink_N}
            attended = attend(grouped, *source[:2], mask_TS, **options, bias_BNTS=bias, bias_BMS=bias_BMS)
        attended = self._gated(place_heads(attended, routing).reshape(*query.shape[:3], spec.value_dim), x_BTD)
        output = projection.einsum("BTNH,NHD->BTD", attended, self.w_output.astype(dtype))
        if spec.output_bias:
            output = output + self.b_output.astype(dtype)
        return Attended(output, cache, value, None, source if spec.keys_of_layer is None else None)

    def _tempered(self, feature: mx.array, position_T: mx.array) -> mx.array:
        """Multiply features [B, T, N, H] by the temperature of their position, if there is one."""
        if self.spec.temperature_tuning is None:
            return feature
        temperature_T = temperature(self.spec.temperature_tuning, mx.maximum(position_T, 0))
        return (feature * temperature_T[..., None, None]).astype(feature.dtype)

    def _sinks(self, x_BTD: mx.array) -> mx.array | None:
        """Return the sinks in float32: [N], or [B, T, N] where they are a projection; None: there are none."""
        if self.spec.projected_sinks:
            return projection.einsum("BTD,DN->BTN", x_BTD, self.w_sink.astype(x_BTD.dtype)).astype(mx.float32)
        return self.sink.astype(mx.float32) if self.spec.sinks else None

    def _relative(self, x_BTD: mx.array, position_T: mx.array) -> Relative | None:
        """Return features and profiles of relative position logits, if there are any."""
        if self.spec.relative is None:
            return None
        feature_BTNZ, profile_ZS = self.relative(x_BTD)
        return Relative(self._tempered(feature_BTNZ, position_T), profile_ZS)

    def _projected(
        self,
        x_BTD: mx.array,
        past: ConvolutionState | KeyValueState | None,
        real_BT: mx.array | None,
        documents: Documents | None,
        key_value_BTD: tuple[mx.array, mx.array] | None,
    ) -> tuple[mx.array, mx.array | None, mx.array | None, Any]:
        """Spec: moezoo.core.reference.attention._projected; with the state of the convolution, None without one."""
        spec, dtype = self.spec, x_BTD.dtype
        query = projection.einsum("BTD,DNH->BTNH", x_BTD, self.w_query.astype(dtype))
        if spec.qkv_bias:
            query = query + self.b_query.astype(dtype)
        if spec.keys_of_layer is not None:
            return query, None, None, None
        key_BTD, value_BTD = (x_BTD, x_BTD) if key_value_BTD is None else key_value_BTD
        key = projection.einsum("BTD,DMH->BTMH", key_BTD, self.w_key.astype(dtype))
        if spec.qkv_bias:
            key = key + self.b_key.astype(dtype)
        if spec.convolution is not None:
            assert not isinstance(past, KeyValueState)
            convolved: tuple[mx.array, mx.array, mx.array, ConvolutionState]
            convolved = self.convolution(x_BTD, query, key, past, real_BT, documents)
            return convolved
        if spec.values_from_keys:
            return query, key, key, None
        value = projection.einsum("BTD,DMH->BTMH", value_BTD, self.w_value.astype(dtype))
        value = value + self.b_value.astype(dtype) if spec.qkv_bias else value
        if spec.kv_convolution is None:
            return query, key, value, None
        inputs = past if isinstance(past, KeyValueState) else KeyValueState(None, None)
        options: dict[str, Any] = {"real_BT": real_BT, "documents": documents}
        key, of_key = self.key_convolution(key, key_BTD, inputs.key_BSMH, **options)
        value, of_value = self.value_convolution(value, value_BTD, inputs.value_BSMH, **options)
        return query, key, value, KeyValueState(of_key, of_value)

    def _keys_and_values(
        self, key: mx.array, value: mx.array, position_T: mx.array | range
    ) -> tuple[mx.array, mx.array]:
        """Return keys after norm and rotation, and values before any value residual."""
        spec, dtype = self.spec, key.dtype
        if spec.value_norm is not None:
            value = self.value_norm(value)
        value = self._clipped(value)
        if spec.value_multiplier != 1:
            value = (value.astype(mx.float32) * spec.value_multiplier).astype(dtype)
        key = self._rotated(key, None if spec.qk_norm is None else self.key_norm, position_T)
        if spec.key_temperature:
            key = (key * self.key_temperature.astype(mx.float32)[:, None]).astype(dtype)
        return key, value

    def _rotated(
        self,
        x: mx.array,
        norm: RMSNorm | LayerNorm | None,
        position_T: mx.array | range,
        scale_NH: mx.array | None = None,
    ) -> mx.array:
        """Normalize, clip and rotate queries or keys; a scale multiplies queries before an L2 clip."""
        spec = self.spec
        if norm is not None and not spec.qk_norm_after_rotation:
            x = norm(x)
        if spec.qk_l2_clip is not None:
            dtype, x = x.dtype, x.astype(mx.float32)
            x = x if scale_NH is None else x * scale_NH.astype(mx.float32)
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

    def _clipped(self, x: mx.array) -> mx.array:
        clip = self.spec.clip
        return x if clip is None else mx.clip(x, -clip, clip)

    def _gated(self, attended_BTNH: mx.array, x_BTD: mx.array) -> mx.array:
        """Multiply the output of the heads by the sigmoid or softplus gate of the layer's input, if there is one."""
        match self.spec.gate:
            case "headwise":
                gate = projection.einsum("BTD,DN->BTN", x_BTD, self.w_gate.astype(x_BTD.dtype))[..., None]
            case "elementwise":
                gate = projection.einsum("BTD,DNH->BTNH", x_BTD, self.w_gate.astype(x_BTD.dtype))
            case None:
                return attended_BTNH
            case _:
                assert_never(self.spec.gate)
        gate = gate.astype(mx.float32)
        if self.spec.gate_bias is not None:
            gate = gate + self.b_gate.astype(mx.float32).reshape(self.spec.num_heads, -1)
        gate = nn.softplus(gate) if self.spec.gate_function == "softplus" else mx.sigmoid(gate)
        return (attended_BTNH * gate).astype(attended_BTNH.dtype)
