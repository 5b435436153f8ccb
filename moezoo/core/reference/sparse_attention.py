"""Sparse attention to the tokens that an indexer chooses (DeepSeek sparse attention)."""

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents, causal_windows, rotate, token_mean
from moezoo.core.spec import BlockIndexerSpec, IndexerSpec, NoPositionSpec, PositionSpec, RoPESpec


def indexer(
    spec: IndexerSpec,
    position: PositionSpec,
    rope_head_dim: int,
    parameters: Parameters,
    x_BTD: Array,
    source_BTZ: Array,
    position_T: Array,
    documents: Documents | None = None,
) -> tuple[Array, Array, Array]:
    """Return the queries of N index heads, the key that they share, and the weight of each head for each query.

    With a `pool_size` the key at each token is that of the pool of tokens that ends there (`pool_keys`). Gradients stop
    at the inputs: the indexer trains on `index_loss` alone, and `index_loss` trains nothing else.

    Args:
        spec: N `num_heads` of width H.
        position: the position spec of the attention; its rotation is applied in the indexer's own `layout`.
        rope_head_dim: number of features of queries and key that are rotated, the `rotated` ones: first or last.
        parameters: `w_query` [Z, N, H], `w_key` [D, H], `key_norm`, `w_weight` [D, N]; with pools `w_gate` [D, H] and
            `position_bias`, as `bias_SH` of `pool_keys`.
        x_BTD: input of the attention layer.
        source_BTZ: the normalized low-rank queries of the attention; x_BTD where it has none.
        position_T: int, from 0 in each document.
        documents: those of packed sequences, whose pools begin anew.

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
    if spec.pool_size is not None:
        gate_BTH = adapter.einsum("BTD,DH->BTH", x_BTD, parameters["w_gate"])
        key_BTH = pool_keys(key_BTH, gate_BTH, parameters["position_bias"], documents)
    return query_BTNH, key_BTH, weight_BTN


def pool_keys(key_BSH: Array, gate_BSH: Array, bias_SH: Array, documents: Documents | None = None) -> Array:
    """Return at each token the key of the pool of tokens that ends there: `sum_w softmax_w(gate_w + bias_w) key_w`.

    The softmax is for each feature by itself, over the places w of the pool, of which `bias_SH` has as many as rows.
    A key is of no use where no pool ends.

    Source: Z.ai 2026 (GLM-5.3); transformers 5.23, `Glm5NextTextIndexer`; after DeepSeek-AI 2026 (DeepSeek-V4), eq. 9.
    """
    keys, gates = (causal_windows(x_BSH, len(bias_SH), documents) for x_BSH in (key_BSH, gate_BSH))
    logits = [gate + bias for gate, bias in zip(gates, bias_SH, strict=True)]
    largest = np.max(np.stack([getval(logit) for logit in logits]), axis=0)
    powers = [np.exp(logit - largest) for logit in logits]
    return sum(power * key for power, key in zip(powers, keys, strict=True)) / sum(powers)


def choose_pools(spec: IndexerSpec, index_BTS: Array, position_T: Array, position_S: Array, mask_TS: Array) -> Array:
    """Return the tokens that each query attends to, `top_k` of them in pools: bool [B, T, S].

    Args:
        spec: its pools that end at the tokens with the highest index are chosen.
        index_BTS: the index of pools, at their last tokens.
        position_T, position_S: int, [T] and [S], or [B, T] and [B, S].
        mask_TS: bool, the causal mask; or one for each sequence, [B, T, S].

    Source: Z.ai 2026 (GLM-5.3); transformers 5.23, `Glm5NextTextIndexer`.
    """
    assert spec.pool_size is not None
    return choose_complete(index_BTS, spec.pool_size, spec.top_k // spec.pool_size, position_T, position_S, mask_TS)


def pool_distribution(
    spec: IndexerSpec, distribution_BTS: Array, chosen_BTS: Array, position_S: Array
) -> tuple[Array, Array]:
    """Return how the attention to chosen pools is distributed over them, at their last tokens, and which these are.

    Both are [B, T, S], as `index_loss` takes them. A query without a complete pool has one choice, the first token.

    Args:
        distribution_BTS: attention weights averaged over heads, as of `attend_where`.
        chosen_BTS: the tokens attended to, as of `choose_pools`.
        position_S: int, [S], or [B, S].

    Differs: the published code has no loss; this is eq. 4 of DeepSeek-AI 2025 (DeepSeek-V3.2-Exp) for pools.
    """
    assert spec.pool_size is not None
    end_BTS = chosen_BTS & (position_S % spec.pool_size == spec.pool_size - 1)[..., None, :]
    alone_BTS = ~np.any(end_BTS, axis=-1, keepdims=True) & (np.arange(position_S.shape[-1]) == 0)
    parts = causal_windows(np.swapaxes(distribution_BTS, 1, 2), spec.pool_size)
    mass_BTS = np.where(alone_BTS, 1.0, np.where(end_BTS, np.swapaxes(sum(parts), 1, 2), 0.0))
    return mass_BTS / np.maximum(np.sum(mass_BTS, axis=-1, keepdims=True), 1e-30), end_BTS | alone_BTS


def block_indexer(
    spec: BlockIndexerSpec,
    position: PositionSpec,
    head_dim: int,
    parameters: Parameters,
    x_BTD: Array,
    position_T: Array,
    documents: Documents | None = None,
) -> tuple[Array, Array]:
    """Return the queries of N index heads, and at each token the key of the block of tokens that ends there.

    A key is the normalized mean of its tokens' projections, rotated at the place of the first of them; with
    `pooled: scores` it is the token's own, rotated at its place. Gradients stop at the inputs.

    Args:
        spec: N `num_heads` of width H, and `block_size`.
        position: the position spec of the attention; the rotation is that of the attention's features.
        head_dim: of the attention.
        parameters: `w_query` [D, N, H], `w_key` [D, H], `query_norm` and `key_norm`.
        x_BTD: input of the attention layer.
        position_T: int, from 0 in each document.
        documents: those of packed sequences, whose blocks begin anew.

    Returns:
        [B, T, N, H] and [B, T, H]; a mean is of no use where no block ends.

    Source: Qwen Team 2026; transformers 5.23, `Qwen4ExpTextQSAIndexer`; and `MiniMaxM3VLIndexer`.
    """
    x_BTD = getval(x_BTD)
    query_BTNH = adapter.einsum("BTD,DNH->BTNH", x_BTD, parameters["w_query"])
    query_BTNH = normalize(spec.norm, inside(parameters, "query_norm"), query_BTNH)
    key_BTH = adapter.einsum("BTD,DH->BTH", x_BTD, parameters["w_key"])
    place_T = position_T
    if spec.pooled == "keys":
        key_BTH = sum(causal_windows(key_BTH, spec.block_size, documents)) / spec.block_size
        place_T = np.maximum(position_T - spec.block_size + 1, 0)
    key_BTH = normalize(spec.norm, inside(parameters, "key_norm"), key_BTH)
    match position:
        case RoPESpec():
            own, rotated = head_rotation(position, head_dim)
            query_BTNH = rotate_first(own, rotated, query_BTNH, position_T)
            key_BTH = rotate_first(own, rotated, key_BTH[:, :, None], place_T)[:, :, 0]
        case NoPositionSpec():
            pass
    return query_BTNH, key_BTH


def head_rotation(position: RoPESpec, head_dim: int) -> tuple[RoPESpec, int]:
    """Return the rotation of an attention's heads as that of features alone, and the number of them that it rotates."""
    if position.fraction_of == "features":
        return position.model_copy(update={"fraction": 1.0}), position.rotated_dim(head_dim)
    return position, head_dim


def choose_blocks(
    spec: BlockIndexerSpec, query_BTNH: Array, key_BSH: Array, position_T: Array, position_S: Array, mask_TS: Array
) -> Array:
    """Return the tokens that each query attends to: of the chosen blocks, and behind the last complete one.

    With `pooled: scores`, as `choose_highest_blocks` does.

    Args:
        spec: `top_k` of its blocks have the highest `index`, at equal weights `1 / sqrt(H)`.
        query_BTNH, key_BSH: as `block_indexer` returns them.
        position_T, position_S: int, [T] and [S], or [B, T] and [B, S].
        mask_TS: bool, the causal mask; or one for each sequence, [B, T, S].

    Returns:
        bool [B, T, S]; with `pooled: scores` [B, M, T, S].
    """
    if spec.pooled == "scores":
        return choose_highest_blocks(spec, query_BTNH, key_BSH, position_T, position_S, mask_TS)
    weight_BTN = np.full(query_BTNH.shape[:3], 1 / np.sqrt(spec.head_dim))
    index_BTS = index(query_BTNH, key_BSH, weight_BTN)
    return choose_complete(index_BTS, spec.block_size, spec.top_k, position_T, position_S, mask_TS)


def choose_complete(
    index_BTS: Array, size: int, number: int, position_T: Array, position_S: Array, mask_TS: Array
) -> Array:
    """Return the tokens of the complete blocks of `size` with the highest index, and those behind the last of them.

    The index of a block is at its last token, and `number` of them are chosen. Other arguments as for `choose_blocks`.
    """
    ends_TS = mask_TS & (position_S % size == size - 1)[..., None, :]
    chosen_BTS = choose_sources(index_BTS, ends_TS, number)
    places = np.arange(position_S.shape[-1])
    end = np.minimum(places + size - 1 - position_S % size, places[-1])[..., None, :]
    chosen_BTS = np.take_along_axis(chosen_BTS, np.broadcast_to(end, (len(index_BTS), *end.shape[-2:])), axis=-1)
    complete_T1 = ((position_T + 1) // size * size)[..., None]
    return mask_TS & (chosen_BTS | (position_S[..., None, :] >= complete_T1))


def choose_highest_blocks(
    spec: BlockIndexerSpec, query_BTMH: Array, key_BSH: Array, position_T: Array, position_S: Array, mask_TS: Array
) -> Array:
    """Return the tokens of the `top_k` blocks with the highest scores, for each of M index heads: bool [B, M, T, S].

    The score of a block is the largest `query . key` of its unmasked tokens, and infinite for the last `local_blocks`
    of them, the query's own included. Arguments as for `choose_blocks`.

    Source: MiniMax 2026; transformers 5.23, `MiniMaxM3VLIndexer`.
    Differs: there blocks are counted from the first slot of a batch, so that padding on the left shifts them.
    """
    size, place_S = spec.block_size, np.arange(position_S.shape[-1])
    score_BMTS = np.swapaxes(np.einsum("BTMH,BSH->BMST", getval(query_BTMH), getval(key_BSH)), -1, -2)
    first_BS = np.broadcast_to(np.maximum(place_S - position_S % size, 0), key_BSH.shape[:2])
    near_TS = position_T[..., :, None] // size - position_S[..., None, :] // size < spec.local_blocks
    mask_BMTS, near_BMTS = (np.broadcast_to(_by_head(x), score_BMTS.shape) for x in (mask_TS, near_TS))
    score_BMTS = np.where(mask_BMTS, np.where(near_BMTS, np.inf, score_BMTS), -np.inf)
    same_BSS = first_BS[:, :, None] == first_BS[:, None, :]
    block_BMTS = np.max(np.where(same_BSS[:, None, None], score_BMTS[..., None, :], -np.inf), axis=-1)
    candidate_BMTS = (block_BMTS > -np.inf) & (first_BS == place_S)[:, None, None]
    chosen_BMTS = choose_sources(block_BMTS, candidate_BMTS, spec.top_k)
    chosen_BMTS = np.take_along_axis(chosen_BMTS, np.broadcast_to(first_BS[:, None, None], score_BMTS.shape), axis=-1)
    return mask_BMTS & chosen_BMTS


def _by_head(mask_TS: Array) -> Array:
    """Return a mask [T, S], or one for each sequence, with an axis for heads."""
    return mask_TS if mask_TS.ndim == 2 else mask_TS[:, None]


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
