"""Attention layers."""

from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.convolution import residual_convolution
from moezoo.core.reference.convolutional_attention import convolved, half_delayed_values
from moezoo.core.reference.dynamic_mask import keep_greatest, key_bias
from moezoo.core.reference.head_router import choose_heads, place_heads
from moezoo.core.reference.normalization import l2_clipped, normalize
from moezoo.core.reference.positions import (
    Documents,
    relative_bias,
    relative_features,
    rotate,
    temperature,
    within_documents,
)
from moezoo.core.reference.routing import Routing
from moezoo.core.reference.sparse_attention import block_indexer, choose_blocks
from moezoo.core.spec import GroupedQueryAttentionSpec, NoPositionSpec, RoPESpec

Source = tuple[Array, Array] | Array
"""What an attention layer has that later ones may share: keys and values, or the positions that its indexer chose."""


class Attended(NamedTuple):
    """Result of an attention layer of any kind: its output [B, T, D], and values that only some kinds have.

    `value_BTMH`: values of grouped-query attention, before any value residual. `index_loss`: the scalar loss that
    trains an indexer. `source`: the keys and values attended to, from grouped-query attention that computes its own, or
    the positions bool [B, T, S], from latent attention with an indexer. Each is None where it does not apply.
    """

    out_BTD: Array
    value_BTMH: Array | None
    index_loss: Array | None
    source: Source | None = None


def attend(
    query_BTMGH: Array,
    key_BSMH: Array,
    value_BSMH: Array,
    mask_TS: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_N: Array | None = None,
    bias_BNTS: Array | None = None,
    bias_BMS: Array | None = None,
) -> Array:
    """Scaled dot-product attention over the unmasked source positions, `softmax(scale q k) v`, in float32.

    Args:
        query_BTMGH: N = M * G query heads, grouped by the key/value head that they share.
        key_BSMH, value_BSMH: M heads; the head width of values and of the result may differ from that of queries.
        mask_TS: bool, True where query t may attend to source s; at least one True per row. [B, T, S]: one mask per
            sequence; [B, M, T, S]: and per group of heads.
        scale: multiplies the scores; None means `1 / sqrt(H)`.
        softcap: scores become `softcap * tanh(score / softcap)`, after the scale and before the mask.
        sink_N: attention sinks: one logit per head that joins the softmax denominator and carries no value: a weight is
            `exp(score) / (exp(sink) + sum over s of exp(score))`. Neither scaled nor capped. [B, T, N]: one per query.
        bias_BNTS: added to the scores, after the scale and the softcap.
        bias_BMS: the same, for each key, whatever the query.

    Returns:
        [B, T, M, G, H].

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouping: Ainslie et al. 2023, arXiv 2305.13245; softcap:
    Gemma 2, arXiv 2408.00118, section 2; sinks: gpt-oss model card (OpenAI 2025), arXiv 2508.10925.
    """
    score = np.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH)
    score = score / np.sqrt(query_BTMGH.shape[-1]) if scale is None else score * scale
    if softcap is not None:
        score = softcap * np.tanh(score / softcap)
    if bias_BNTS is not None:
        score = score + bias_BNTS.reshape(score.shape)
    if bias_BMS is not None:
        score = score + bias_BMS[:, :, None, None]
    mask_TS = mask_TS[:, None] if mask_TS.ndim == 3 else mask_TS
    score = np.where(mask_TS[..., None, :, :], score, -np.inf)
    largest = np.max(score, axis=-1, keepdims=True)
    total = 0.0
    if sink_N is not None:
        sink_BNT = sink_N[None, :, None] if sink_N.ndim == 1 else np.swapaxes(sink_N, 1, 2)
        sink_BMGT1 = sink_BNT.reshape(len(sink_BNT), *query_BTMGH.shape[2:4], -1, 1)
        largest = np.maximum(largest, sink_BMGT1)
        total = np.exp(sink_BMGT1 - largest)
    weight = np.exp(score - largest)
    weight = weight / (total + np.sum(weight, axis=-1, keepdims=True))
    return np.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH)


def visible(spec: GroupedQueryAttentionSpec, position_T: Array, position_S: Array) -> Array:
    """Return the causal mask, with the sliding window or the chunks of the spec: bool [T, S], by positions.

    For positions [B, T] and [B, S], one mask per sequence.

    A query attends to itself and to earlier tokens: with `window`, only to the last `window` of them, itself included
    (`t - window < s <= t`); with `chunk`, only to those in its own chunk (`s // chunk == t // chunk`).

    Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1 (window, two-sided there); Llama-4 (chunk).
    """
    position_T1, position_1S = position_T[..., :, None], position_S[..., None, :]
    mask_TS = position_T1 >= position_1S
    if spec.window is not None:
        mask_TS = mask_TS & (position_T1 - position_1S < spec.window)
    if spec.chunk is not None:
        mask_TS = mask_TS & (position_T1 // spec.chunk == position_1S // spec.chunk)
    return mask_TS


def grouped_query_attention(
    spec: GroupedQueryAttentionSpec,
    parameters: Parameters,
    x_BTD: Array,
    *,
    first_value_BTMH: Array | None = None,
    source: tuple[Array, Array] | None = None,
    documents: Documents | None = None,
    routing: Routing | None = None,
    key_value_BTD: tuple[Array, Array] | None = None,
) -> Attended:
    """Causal self-attention of T tokens at positions 0 .. T-1, or in each document: [B, T, D] -> [B, T, D].

    Order: project (and add biases), and apply the `convolution` or `kv_convolution`; normalize queries and keys if
    `qk_norm` and apply RoPE, or in the opposite order, with `qk_l2_clip` and `clip` before the rotation in both cases;
    multiply queries (with their `relative` features) and keys by their temperatures; normalize, clip, scale and mix
    values; attend; gate; apply the output projection.

    Args:
        first_value_BTMH: values of the model's first layer, mixed in by `value_residual`; the first layer itself has
            no `value_mix`.
        source: keys and values of layer `keys_of_layer`, as that layer attends to them.
        documents: those of packed sequences, each by itself; None: every sequence is one.
        routing: of a router over heads: K of the G query heads of each key/value head attend (`choose_heads`).
        key_value_BTD: what keys, and what values are projected from; None: from x, as all else is.

    Source: see GroupedQueryAttentionSpec.
    """
    query, key, value = _projected(spec, parameters, x_BTD, documents, key_value_BTD)
    batch, length = x_BTD.shape[:2]
    position_T = np.arange(length) if documents is None else documents.position_BT
    query = _rotated(spec, inside(parameters, "query_norm"), query, position_T, parameters.get("query_scale"))
    query = _tempered(spec, query, position_T)
    if source is None:
        assert key is not None
        assert value is not None
        key, value = _keys_and_values(spec, parameters, key, value, position_T)
        mixed = value
        if "value_mix" in parameters:
            mix = parameters["value_mix"]
            mixed = (1 - mix) * value + mix * first_value_BTMH
        source = key, mixed
    key, mixed = source
    bias_BMS = None if spec.dynamic_mask is None else key_bias(inside(parameters, "dynamic_mask"), mixed)
    attended = attend(
        choose_heads(query.reshape(batch, length, spec.num_kv_heads, -1, spec.head_dim), routing),
        key,
        mixed,
        keep_greatest(spec.dynamic_mask, bias_BMS, _mask(spec, parameters, x_BTD, position_T, documents)),
        scale=spec.scale,
        softcap=spec.softcap,
        sink_N=_sinks(spec, parameters, x_BTD),
        bias_BNTS=_relative_bias(spec, parameters, x_BTD, position_T),
        bias_BMS=bias_BMS,
    )
    attended = place_heads(attended, routing).reshape(batch, length, spec.num_heads, spec.value_dim)
    attended = _gated(spec, parameters, attended, x_BTD)
    output = adapter.einsum("BTNH,NHD->BTD", attended, parameters["w_output"])
    output = output + parameters["b_output"] if spec.output_bias else output
    return Attended(output, value, None, source if spec.keys_of_layer is None else None)


def _projected(
    spec: GroupedQueryAttentionSpec,
    parameters: Parameters,
    x_BTD: Array,
    documents: Documents | None,
    key_value_BTD: tuple[Array, Array] | None,
) -> tuple[Array, Array | None, Array | None]:
    """Return queries, keys and values as projected, or as the convolution makes them of the projected ones.

    Without keys of its own, a layer has None in their place, and in that of values.
    """
    query = adapter.einsum("BTD,DNH->BTNH", x_BTD, parameters["w_query"])
    if spec.qkv_bias:
        query = query + parameters["b_query"]
    if spec.keys_of_layer is not None:
        return query, None, None
    key_BTD, value_BTD = (x_BTD, x_BTD) if key_value_BTD is None else key_value_BTD
    key = adapter.einsum("BTD,DMH->BTMH", key_BTD, parameters["w_key"])
    if spec.qkv_bias:
        key = key + parameters["b_key"]
    if spec.convolution is not None:
        own = inside(parameters, "convolution")
        return *convolved(own, query, key, documents), half_delayed_values(own, x_BTD, spec.num_kv_heads, documents)
    if spec.values_from_keys:
        return query, key, key
    value = adapter.einsum("BTD,DMH->BTMH", value_BTD, parameters["w_value"])
    value = value + parameters["b_value"] if spec.qkv_bias else value
    if spec.kv_convolution is not None:
        of_key, of_value = inside(parameters, "key_convolution"), inside(parameters, "value_convolution")
        key = residual_convolution(spec.kv_convolution, of_key, key, key_BTD, documents)
        value = residual_convolution(spec.kv_convolution, of_value, value, value_BTD, documents)
    return query, key, value


def _mask(
    spec: GroupedQueryAttentionSpec,
    parameters: Parameters,
    x_BTD: Array,
    position_T: Array,
    documents: Documents | None,
) -> Array:
    """Return what each query may attend to: [T, S], [B, T, S] or [B, M, T, S]."""
    mask_TS = within_documents(visible(spec, position_T, position_T), documents)
    if spec.indexer is None:
        return mask_TS
    own = inside(parameters, "indexer")
    index = block_indexer(spec.indexer, spec.position, spec.head_dim, own, x_BTD, position_T, documents)
    return choose_blocks(spec.indexer, *index, position_T, position_T, mask_TS)


def _keys_and_values(
    spec: GroupedQueryAttentionSpec, parameters: Parameters, key: Array, value: Array, position_T: Array
) -> tuple[Array, Array]:
    """Return keys after norm and rotation, and values before any value residual."""
    if spec.value_norm is not None:
        value = normalize(spec.value_norm, inside(parameters, "value_norm"), value)
    key = _rotated(spec, inside(parameters, "key_norm"), key, position_T)
    key = key * parameters["key_temperature"][:, None] if spec.key_temperature else key
    return key, spec.value_multiplier * _clipped(spec, value)


def _tempered(spec: GroupedQueryAttentionSpec, feature_BTNH: Array, position_T: Array) -> Array:
    """Multiply features by the temperature of their position, if there is one."""
    if spec.temperature_tuning is None:
        return feature_BTNH
    return feature_BTNH * temperature(spec.temperature_tuning, position_T)[..., None, None]


def _sinks(spec: GroupedQueryAttentionSpec, parameters: Parameters, x_BTD: Array) -> Array | None:
    """Return the sinks: [N], or [B, T, N] where they are a projection; None: there are none."""
    if spec.projected_sinks:
        return adapter.einsum("BTD,DN->BTN", x_BTD, parameters["w_sink"])
    return parameters["sink"] if spec.sinks else None


def _relative_bias(
    spec: GroupedQueryAttentionSpec, parameters: Parameters, x_BTD: Array, position_T: Array
) -> Array | None:
    """Return the relative position logits [B, N, T, T], if there are any."""
    if spec.relative is None:
        return None
    own = inside(parameters, "relative")
    feature = relative_features(spec.relative, own, x_BTD)
    feature = _tempered(spec, feature, position_T)
    return relative_bias(feature, own["profile"], position_T, position_T)


def _rotated(
    spec: GroupedQueryAttentionSpec, norm: Parameters, x: Array, position_T: Array, scale: Array | None = None
) -> Array:
    """Normalize, clip and rotate queries or keys; the norm is over each head, or over all heads of a token together.

    `scale` [N, H] multiplies queries before an L2 clip.
    """
    axes = 1 if spec.qk_norm_over == "head" else 2
    if spec.qk_norm is not None and not spec.qk_norm_after_rotation:
        x = normalize(spec.qk_norm, norm, x, axes)
    if spec.qk_l2_clip is not None:
        x = l2_clipped(x if scale is None else x * scale, spec.qk_l2_clip)
    x = _clipped(spec, x)
    match spec.position:
        case RoPESpec():
            x = rotate(spec.position, x, position_T)
        case NoPositionSpec():
            pass
    return normalize(spec.qk_norm, norm, x, axes) if spec.qk_norm is not None and spec.qk_norm_after_rotation else x


def _gated(spec: GroupedQueryAttentionSpec, parameters: Parameters, attended_BTNH: Array, x_BTD: Array) -> Array:
    """Multiply the output of the heads by the sigmoid or softplus gate of the layer's input, if there is one."""
    match spec.gate:
        case "headwise":
            gate = adapter.einsum("BTD,DN->BTN", x_BTD, parameters["w_gate"])[..., None]
        case "elementwise":
            gate = adapter.einsum("BTD,DNH->BTNH", x_BTD, parameters["w_gate"])
        case None:
            return attended_BTNH
    if spec.gate_bias is not None:
        gate = gate + parameters["b_gate"].reshape(spec.num_heads, -1)
    return attended_BTNH * (np.logaddexp(0, gate) if spec.gate_function == "softplus" else 1 / (1 + np.exp(-gate)))


def _clipped(spec: GroupedQueryAttentionSpec, x: Array) -> Array:
    return x if spec.clip is None else np.clip(x, -spec.clip, spec.clip)
