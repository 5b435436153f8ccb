"""Attention layers."""

from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, inside
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import rotate
from moezoo.core.spec import GroupedQueryAttentionSpec, NoPositionSpec, RoPESpec


class Attended(NamedTuple):
    """What an attention layer of any kind returns: its output [B, T, D], and two things that others ask of some kinds.

    `value_BTMH`: grouped-query attention's own values, before any mix with those of the first layer. `index_loss`: a
    scalar that trains an indexer. Each is None where there is none.
    """

    out_BTD: Array
    value_BTMH: Array | None
    index_loss: Array | None


def attend(query_BTMGH: Array, key_BSMH: Array, value_BSMH: Array, mask_TS: Array) -> Array:
    """`softmax(q k / sqrt(H)) v` over the source positions that the mask allows, in float32.

    Args:
        query_BTMGH: N = M * G query heads, grouped by the key/value head that serves them.
        key_BSMH, value_BSMH: M heads.
        mask_TS: bool, True where query t may look at source s; at least one True a row.

    Returns:
        [B, T, M, G, H].

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouping: Ainslie et al. 2023, arXiv 2305.13245.
    """
    score = np.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH) / np.sqrt(query_BTMGH.shape[-1])
    score = np.where(mask_TS, score, -np.inf)
    weight = np.exp(score - np.max(score, axis=-1, keepdims=True))
    weight = weight / np.sum(weight, axis=-1, keepdims=True)
    return np.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH)


def grouped_query_attention(
    spec: GroupedQueryAttentionSpec, parameters: Parameters, x_BTD: Array, *, first_value_BTMH: Array | None = None
) -> Attended:
    """Causal self-attention of T tokens at positions 0 .. T-1: [B, T, D] -> [B, T, D].

    Order: project (and add biases), normalize each head if `qk_norm`, rotate if RoPE, attend, project back.
    """
    query = np.einsum("BTD,DNH->BTNH", x_BTD, parameters["w_query"])
    key = np.einsum("BTD,DMH->BTMH", x_BTD, parameters["w_key"])
    value = np.einsum("BTD,DMH->BTMH", x_BTD, parameters["w_value"])
    if spec.qkv_bias:
        query, key, value = (
            query + parameters["b_query"],
            key + parameters["b_key"],
            value + parameters["b_value"],
        )
    if spec.qk_norm is not None:
        query = normalize(spec.qk_norm, inside(parameters, "query_norm"), query)
        key = normalize(spec.qk_norm, inside(parameters, "key_norm"), key)
    batch, length = x_BTD.shape[:2]
    position_T = np.arange(length)
    match spec.position:
        case RoPESpec():
            query, key = rotate(spec.position, query, position_T), rotate(spec.position, key, position_T)
        case NoPositionSpec():
            pass
    grouped = query.reshape(batch, length, spec.num_kv_heads, -1, spec.head_dim)
    mask_TS = position_T[:, None] >= position_T[None, :]
    attended = attend(grouped, key, value, mask_TS).reshape(batch, length, spec.num_heads, spec.head_dim)
    output = np.einsum("BTNH,NHD->BTD", attended, parameters["w_output"])
    if spec.output_bias:
        output = output + parameters["b_output"]
    return Attended(output, value, None)
