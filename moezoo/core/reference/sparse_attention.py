"""Sparse attention to the tokens that an indexer chooses (DeepSeek sparse attention)."""

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents, rotate, token_mean
from moezoo.core.spec import IndexerSpec, NoPositionSpec, PositionSpec, RoPESpec


def indexer(
    spec: IndexerSpec,
    position: PositionSpec,
    rope_head_dim: int,
    parameters: Parameters,
    x_BTD: Array,
    source_BTZ: Array,
    position_T: Array,
) -> tuple[Array, Array, Array]:
    """Return the queries of N index heads, the key that they share, and the weight of each head for each query.

    Gradients stop at the inputs: the indexer trains on `index_loss` alone, and `index_loss` trains nothing else.

    Args:
        spec: N `num_heads` of width H.
        position: the position spec of the attention; its rotation is applied in the indexer's own `layout`.
        rope_head_dim: number of features of queries and key that are rotated, the `rotated` ones: first or last.
        parameters: `w_query` [Z, N, H], `w_key` [D, H], `key_norm`, `w_weight` [D, N].
        x_BTD: input of the attention layer.
        source_BTZ: the normalized low-rank queries of the attention; x_BTD where it has none.
        position_T: int.

    Returns:
        [B, T, N, H], [B, T, H] and [B, T, N]; the last, in float32, includes the factors `1 / sqrt(H)` and
        `1 / sqrt(N)` of the published code.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 1, and the inference code published with it.
    Differs: that code multiplies queries and key by a Hadamard matrix, which changes no product, and rounds them to
    8 bits.
    """
    x_BTD, source_BTZ = getval(x_BTD), getval(source_BTZ)
    query_BTNH = adapter.einsum("BTZ,ZNH->BTNH", source_BTZ, parameters["w_query"])
    key_BTH = adapter.einsum("BTD,DH->BTH", x_BTD, parameters["w_key"])
    key_BTH = normalize(spec.key_norm, inside(parameters, "key_norm"), key_BTH)
    weight_BTN = adapter.einsum("BTD,DN->BTN", x_BTD, parameters["w_weight"]) / np.sqrt(spec.num_heads * spec.head_dim)
    match position:
        case RoPESpec():
            own = position.model_copy(update={"layout": spec.layout})
            rotate_part = rotate_first if spec.rotated == "first" else rotate_last
            query_BTNH = rotate_part(own, rope_head_dim, query_BTNH, position_T)
            key_BTH = rotate_part(own, rope_head_dim, key_BTH[:, :, None], position_T)[:, :, 0]
        case NoPositionSpec():
            pass
    return query_BTNH, key_BTH, weight_BTN


def rotate_first(position: RoPESpec, rope_head_dim: int, x_BTNH: Array, position_T: Array) -> Array:
    """Apply `rotate` to the first `rope_head_dim` features as if they were the whole head."""
    rotated = rotate(position, x_BTNH[..., :rope_head_dim], position_T)
    return np.concatenate([rotated, x_BTNH[..., rope_head_dim:]], axis=-1)


def rotate_last(position: RoPESpec, rope_head_dim: int, x_BTNH: Array, position_T: Array) -> Array:
    """Apply `rotate` to the last `rope_head_dim` features as if they were the whole head."""
    start = x_BTNH.shape[-1] - rope_head_dim
    rotated = rotate(position, x_BTNH[..., start:], position_T)
    return np.concatenate([x_BTNH[..., :start], rotated], axis=-1)


def index(query_BTNH: Array, key_BSH: Array, weight_BTN: Array) -> Array:
    """Return index scores `index(t, s) = sum_n weight_n(t) relu(query_n(t) . key(s))`: [B, T, S] in float32.

    They are not masked, and may have either sign.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 1.
    """
    score_BTNS = np.einsum("BTNH,BSH->BTNS", query_BTNH, key_BSH)
    return np.einsum("BTN,BTNS->BTS", weight_BTN, np.where(score_BTNS > 0, score_BTNS, 0.0))


def choose_sources(index_BTS: Array, mask_TS: Array, top_k: int) -> Array:
    """Return the `top_k` unmasked positions with the highest index for each query: bool [B, T, S].

    All unmasked positions where they are fewer than `top_k`. Ties, such as between positions where every relu is zero,
    go to the lower position. No gradient.

    Trap: a top-k of the unmasked index spends its choices on future tokens, and the mask then leaves early queries with
    few positions or none.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 2.
    """
    allowed = np.where(mask_TS, getval(index_BTS), -np.inf)
    rank_BTS = np.argsort(np.argsort(-allowed, axis=-1, kind="stable"), axis=-1)
    return (rank_BTS < top_k) & mask_TS


def attend_where(
    query_BTMGH: Array, key_BSMH: Array, value_BSMH: Array, mask_BTS: Array, scale: float, sink_N: Array | None = None
) -> tuple[Array, Array]:
    """Apply `attention.attend` with one mask per sequence, and return the attention weights averaged over heads too.

    Args:
        query_BTMGH: N = M * G query heads, grouped by the key/value head that they share.
        key_BSMH, value_BSMH: M heads; values may have another width than keys.
        mask_BTS: bool, at least one True per row.
        scale: multiplies the scores.
        sink_N: attention sinks, as in `attend`.

    Returns:
        [B, T, M, G, H], H the width of a value; and [B, T, S], the mean weights of all heads, over their sum,
        which is less than 1 with sinks; without gradient.
    """
    score = scale * np.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH)
    score = np.where(mask_BTS[:, None, None], score, -np.inf)
    largest, total = np.max(score, axis=-1, keepdims=True), 0.0
    if sink_N is not None:
        sink_MG11 = sink_N.reshape(*query_BTMGH.shape[2:4], 1, 1)
        largest = np.maximum(largest, sink_MG11)
        total = np.exp(sink_MG11 - largest)
    weight = np.exp(score - largest)
    weight = weight / (total + np.sum(weight, axis=-1, keepdims=True))
    mean_BTS = np.mean(getval(weight), axis=(1, 2))
    attended = np.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH)
    return attended, mean_BTS / np.sum(mean_BTS, axis=-1, keepdims=True)


def index_loss(index_BTS: Array, distribution_BTS: Array, mask_BTS: Array, documents: Documents | None = None) -> Array:
    """KL divergence of the index from the attention, in nats: mean over tokens of `KL(distribution || softmax(index))`.

    The softmax is over the chosen positions.

    Args:
        index_BTS: float, the index scores that this loss trains.
        distribution_BTS: attention weights averaged over heads; 0 where mask_BTS is False, rows sum to 1; no gradient.
        mask_BTS: bool, the chosen positions.
        documents: those of packed sequences, whose padding does not count.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 4.
    Differs: mean over tokens, where the paper sums.
    """
    logits = np.where(mask_BTS, index_BTS, -np.inf)
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    log_softmax_BTS = np.where(
        mask_BTS, shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True)), 0.0
    )  # outside the mask, 0 * -inf would be NaN
    log_distribution_BTS = np.log(np.where(distribution_BTS > 0, distribution_BTS, 1.0))
    divergence_BT = np.sum(distribution_BTS * (log_distribution_BTS - log_softmax_BTS), axis=-1)
    return token_mean(np.reshape(divergence_BT, -1), None if documents is None else documents.real_P)
