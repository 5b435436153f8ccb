"""Multi-head latent attention (MLA)."""

import math

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.attention import Attended, visible
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents, rotate, score_multiplier, temperature, within_documents
from moezoo.core.reference.sparse_attention import (
    attend_where,
    choose_pools,
    choose_sources,
    index,
    index_loss,
    indexer,
    pool_distribution,
)
from moezoo.core.spec import GroupedQueryAttentionSpec, IndexerSpec, LatentAttentionSpec, NoPositionSpec, RoPESpec


def latent_attention(
    spec: LatentAttentionSpec,
    parameters: Parameters,
    x_BTD: Array,
    *,
    absorbed: bool = False,
    chosen_BTS: Array | None = None,
    documents: Documents | None = None,
) -> Attended:
    """Causal self-attention with keys and values from one latent of width Z per token: [B, T, D] -> [B, T, D].

    Head n has the query `(q_n, rotate(q'_n))`, the key `(c w_key_n, rotate(k'))` and the value `c w_value_n`, where
    `c = norm(x w_latent)` is the latent, `k' = x w_rope_key` is shared by all heads, and `(q_n, q'_n)` is
    `x w_query_n`, or `norm(x w_query_down) w_query_n` with low-rank queries. With an indexer, a query attends only to
    the positions that the indexer chooses (sparse attention), or that another layer's chose: `chosen_BTS`. With a
    `query_gate` the heads' output is multiplied by `sigmoid(s w_query_gate)`, s being what w_query multiplies.

    Order: project, and add the biases of `w_query_down`, `w_latent`, `w_rope_key` and `w_output` if the spec has them;
    normalize, also `k'` with `rope_key_norm`; multiply the latent by its constant; rotate; multiply both parts of a
    query by its temperature; attend, to no more than `window` tokens, with a sink if there are `sinks`; multiply by the
    sigmoid of `x w_gate_n`, a number or one for each feature, if there is a gate.

    The absorbed form computes the same numbers from latents alone, so a cache stores nothing else: `q_n . (c w_key_n) =
    (w_key_n q_n) . c`, and `sum_s a_s (c_s w_value_n) = (sum_s a_s c_s) w_value_n`. It is multi-query attention with
    the single key `(c, rotate(k'))` and the single value `c`.

    Of packed sequences, each of their `documents` is by itself.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, eq. 9-19; absorbed: section 2.1.2.
    """
    position_T = np.arange(x_BTD.shape[1]) if documents is None else documents.position_BT
    source, seen = _query_sources(spec, parameters, x_BTD)
    query, rope_query, latent, rope_key = _projected(spec, parameters, x_BTD, seen, position_T)
    if absorbed:
        query = adapter.einsum("BTNH,ZNH->BTNZ", query, parameters["w_key"])
        grouped = np.concatenate([query, rope_query], axis=-1)[:, :, None]
        key, value = np.concatenate([latent[:, :, None], rope_key], axis=-1), latent[:, :, None]
    else:
        grouped = np.concatenate([query, rope_query], axis=-1)[:, :, :, None]
        key = adapter.einsum("BSZ,ZNH->BSNH", latent, parameters["w_key"])
        key = np.concatenate([key, np.repeat(rope_key, spec.num_heads, axis=2)], axis=-1)
        value = adapter.einsum("BSZ,ZNH->BSNH", latent, parameters["w_value"])
    mask_TS = within_documents(visible(expanded(spec), position_T, position_T), documents)
    mask_BTS, loss = np.broadcast_to(mask_TS, (len(x_BTD), *mask_TS.shape[-2:])), None
    mask_BTS = mask_BTS if chosen_BTS is None else chosen_BTS
    if spec.indexer is not None:
        arguments = inside(parameters, "indexer"), x_BTD, source, position_T, documents
        index_BTS = index(*indexer(spec.indexer, spec.position, spec.rope_head_dim, *arguments))
        mask_BTS = _choose(spec.indexer, index_BTS, position_T, mask_TS)
    attended, distribution_BTS = attend_where(
        grouped, key, value, mask_BTS, score_scale(spec), parameters["sink"] if spec.sinks else None
    )
    if spec.indexer is not None:
        loss = index_loss(index_BTS, *_compared(spec.indexer, distribution_BTS, mask_BTS, position_T), documents)
    if absorbed:
        out_BTNH = np.einsum("BTNZ,ZNH->BTNH", attended[:, :, 0], parameters["w_value"])
    else:
        out_BTNH = attended[:, :, :, 0]
    out_BTD = _output(spec, parameters, out_BTNH, x_BTD, seen)
    return Attended(out_BTD, None, loss, None if spec.indexer is None else mask_BTS)


def _choose(spec: IndexerSpec, index_BTS: Array, position_T: Array, mask_TS: Array) -> Array:
    """Return the positions that each query attends to: of the highest index, or of pools with the highest."""
    if spec.pool_size is None:
        return choose_sources(index_BTS, mask_TS, spec.top_k)
    return choose_pools(spec, index_BTS, position_T, position_T, mask_TS)


def _compared(spec: IndexerSpec, distribution_BTS: Array, chosen_BTS: Array, position_T: Array) -> tuple[Array, Array]:
    """Return the distribution that the index should have, and the positions over which: all chosen, or of pools."""
    if spec.pool_size is None:
        return distribution_BTS, chosen_BTS
    return pool_distribution(spec, distribution_BTS, chosen_BTS, position_T)


def _output(spec: LatentAttentionSpec, parameters: Parameters, out_BTNH: Array, x_BTD: Array, seen_BTZ: Array) -> Array:
    """Multiply the output of the heads by the sigmoid gates of the layer's input and of `seen_BTZ`, and project it."""
    if spec.gate == "headwise":
        out_BTNH = out_BTNH / (1 + np.exp(-adapter.einsum("BTD,DN->BTN", x_BTD, parameters["w_gate"])[..., None]))
    if spec.gate == "elementwise":
        out_BTNH = out_BTNH / (1 + np.exp(-adapter.einsum("BTD,DNH->BTNH", x_BTD, parameters["w_gate"])))
    if spec.query_gate:
        out_BTNH = out_BTNH / (1 + np.exp(-adapter.einsum("BTZ,ZNH->BTNH", seen_BTZ, parameters["w_query_gate"])))
    out_BTD = adapter.einsum("BTNH,NHD->BTD", out_BTNH, parameters["w_output"])
    return out_BTD + parameters["b_output"] if spec.bias else out_BTD


def score_scale(spec: LatentAttentionSpec) -> float:
    """Return the factor on query-key products (attention scores)."""
    scale = 1 / math.sqrt(spec.head_dim + spec.rope_head_dim) if spec.scale is None else spec.scale
    return scale * score_multiplier(spec.position)


def expanded(spec: LatentAttentionSpec) -> GroupedQueryAttentionSpec:
    """Return the multi-head attention that remains once queries, keys and values are expanded per head and rotated."""
    return GroupedQueryAttentionSpec(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_heads,
        head_dim=spec.head_dim + spec.rope_head_dim,
        position=NoPositionSpec(),
        window=spec.window,
        scale=score_scale(spec),
    )


def _query_sources(spec: LatentAttentionSpec, parameters: Parameters, x_BTD: Array) -> tuple[Array, Array]:
    """Return what the indexer's queries are projected from, and those of the attention: x, or the query latent."""
    if spec.query_latent_dim is None:
        return x_BTD, x_BTD
    down = adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_query_down"])
    down = down + parameters["b_query_down"] if spec.bias else down
    source = normalize(spec.norm, inside(parameters, "query_norm"), down)
    return source, np.concatenate([source, down], axis=-1) if spec.raw_query_latent else source


def _projected(
    spec: LatentAttentionSpec, parameters: Parameters, x_BTD: Array, seen_BTZ: Array, position_T: Array
) -> tuple[Array, Array, Array, Array]:
    """Return both parts of queries, latents [B, T, Z], and the shared key [B, T, 1, H]."""
    query = adapter.einsum("BTZ,ZNH->BTNH", seen_BTZ, parameters["w_query"])
    query, rope_query = query[..., : spec.head_dim], query[..., spec.head_dim :]
    latent = adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_latent"])
    latent = latent + parameters["b_latent"] if spec.bias else latent
    if spec.rope_head_dim:
        rope_key = adapter.einsum("BTD,DH->BTH", x_BTD, parameters["w_rope_key"])
        rope_key = rope_key + parameters["b_rope_key"] if spec.bias else rope_key
    else:
        rope_key = np.zeros((*x_BTD.shape[:2], 0))
    latent = spec.latent_multiplier * normalize(spec.norm, inside(parameters, "latent_norm"), latent)
    if spec.rope_key_norm:
        rope_key = normalize(spec.norm, inside(parameters, "rope_key_norm"), rope_key)
    rope_key = rope_key[:, :, None]
    match spec.position:
        case RoPESpec():
            rope_query = rotate(spec.position, rope_query, position_T)
            rope_key = rotate(spec.position, rope_key, position_T)
        case NoPositionSpec():
            pass
    if spec.temperature_tuning is not None:
        temperature_T11 = temperature(spec.temperature_tuning, position_T)[..., None, None]
        query, rope_query = query * temperature_T11, rope_query * temperature_T11
    return query, rope_query, latent, rope_key
