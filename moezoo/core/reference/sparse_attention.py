"""Attention to those tokens that an indexer chooses."""

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.reference import Array, Parameters, inside
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import rotate
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
    """Queries of N index heads, the one key that they share, and how much each head counts for each query.

    No gradient leaves through the inputs: the indexer learns from `index_loss` alone, and the rest of the model not
    from it.

    Args:
        spec: N `num_heads` of width H.
        position: of the attention; its rotation is applied in the indexer's own `layout`.
        rope_head_dim: how many features of queries and key are rotated, the first ones.
        parameters: `w_query` [Z, N, H], `w_key` [D, H], `key_norm`, `w_weight` [D, N].
        x_BTD: input of the attention layer.
        source_BTZ: the normalized low-rank queries of the attention; x_BTD again where it has none.
        position_T: int.

    Returns:
        [B, T, N, H], [B, T, H] and [B, T, N]; the factors `1 / sqrt(H)` and `1 / sqrt(N)` of the published code are
        in the last one, in float32.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 1, and the inference code published with it.
    Differs: that code turns queries and key by a Hadamard matrix, which changes no product, and rounds them to 8 bits.
    """
    x_BTD, source_BTZ = getval(x_BTD), getval(source_BTZ)
    query_BTNH = np.einsum("BTZ,ZNH->BTNH", source_BTZ, parameters["w_query"])
    key_BTH = np.einsum("BTD,DH->BTH", x_BTD, parameters["w_key"])
    key_BTH = normalize(spec.key_norm, inside(parameters, "key_norm"), key_BTH)
    weight_BTN = np.einsum("BTD,DN->BTN", x_BTD, parameters["w_weight"]) / np.sqrt(spec.num_heads * spec.head_dim)
    match position:
        case RoPESpec():
            own = position.model_copy(update={"layout": spec.layout})
            query_BTNH = rotate_first(own, rope_head_dim, query_BTNH, position_T)
            key_BTH = rotate_first(own, rope_head_dim, key_BTH[:, :, None], position_T)[:, :, 0]
        case NoPositionSpec():
            pass
    return query_BTNH, key_BTH, weight_BTN


def rotate_first(position: RoPESpec, rope_head_dim: int, x_BTNH: Array, position_T: Array) -> Array:
    """`rotate` of the first `rope_head_dim` features as if they were the whole head."""
    rotated = rotate(position, x_BTNH[..., :rope_head_dim], position_T)
    return np.concatenate([rotated, x_BTNH[..., rope_head_dim:]], axis=-1)


def index(query_BTNH: Array, key_BSH: Array, weight_BTN: Array) -> Array:
    """`index(t, s) = sum_n weight_n(t) relu(query_n(t) . key(s))`, [B, T, S] in float32, of any s and any sign.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 1.
    """
    score_BTNS = np.einsum("BTNH,BSH->BTNS", query_BTNH, key_BSH)
    return np.einsum("BTN,BTNS->BTS", weight_BTN, np.where(score_BTNS > 0, score_BTNS, 0.0))


def choose_sources(index_BTS: Array, mask_TS: Array, top_k: int) -> Array:
    """Bool [B, T, S]: the `top_k` positions of the highest index among those that the mask allows.

    All allowed ones where they are fewer. Ties, such as between positions where every relu is shut, go to the lower
    position. No gradient.

    Trap: a top-k of the unmasked index spends its choices on the future, and the mask then leaves early queries with
    few positions or none.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 2.
    """
    allowed = np.where(mask_TS, getval(index_BTS), -np.inf)
    rank_BTS = np.argsort(np.argsort(-allowed, axis=-1, kind="stable"), axis=-1)
    return (rank_BTS < top_k) & mask_TS


def attend_where(
    query_BTMGH: Array, key_BSMH: Array, value_BSMH: Array, mask_BTS: Array, scale: float
) -> tuple[Array, Array]:
    """`attention.attend` with a mask for each sequence, and with the distribution that it came from.

    Args:
        query_BTMGH: N = M * G query heads, grouped by the key/value head that serves them.
        key_BSMH, value_BSMH: M heads; a value need not be as wide as a key.
        mask_BTS: bool, at least one True a row.
        scale: multiplies the scores.

    Returns:
        [B, T, M, G, H], H the width of a value; and [B, T, S], the mean over all heads of the softmax, without
        gradient: where a token looked.
    """
    score = scale * np.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH)
    score = np.where(mask_BTS[:, None, None], score, -np.inf)
    weight = np.exp(score - np.max(score, axis=-1, keepdims=True))
    weight = weight / np.sum(weight, axis=-1, keepdims=True)
    return np.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH), np.mean(getval(weight), axis=(1, 2))


def index_loss(index_BTS: Array, distribution_BTS: Array, mask_BTS: Array) -> Array:
    """`mean over tokens of KL(distribution || softmax of the index over the chosen positions)`, nats.

    Args:
        index_BTS: float, what learns.
        distribution_BTS: where the attention looked; 0 where mask_BTS is False, sums to 1 a row; has no gradient.
        mask_BTS: bool, the chosen positions.

    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 4.
    Differs: mean over tokens, where the paper sums.
    """
    logits = np.where(mask_BTS, index_BTS, -np.inf)
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    log_softmax_BTS = np.where(
        mask_BTS, shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True)), 0.0
    )  # where nothing is chosen, 0 * -inf would be NaN
    log_distribution_BTS = np.log(np.where(distribution_BTS > 0, distribution_BTS, 1.0))
    return np.mean(np.sum(distribution_BTS * (log_distribution_BTS - log_softmax_BTS), axis=-1))
