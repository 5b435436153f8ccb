"""Sparse attention to the tokens that an indexer chooses. Spec: moezoo.core.reference.sparse_attention."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.reference import sparse_attention as reference
from moezoo.core.spec import BlockIndexerSpec, IndexerSpec, NoPositionSpec, PositionSpec, RoPESpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kv_cache import IndexedCache
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, causal_windows, positions, rotate, token_mean


class Indexer(nn.Module):
    """Spec: moezoo.core.reference.sparse_attention.indexer."""

    def __init__(self, spec: IndexerSpec, position: PositionSpec, rope_head_dim: int, weights: Weights):
        super().__init__()
        self.spec, self.position, self.rope_head_dim = spec, position, rope_head_dim
        self.w_query = weights.parameter("w_query")
        self.w_key = weights.parameter("w_key")
        self.key_norm = norm(spec.key_norm, weights.inside("key_norm"))
        self.w_weight = weights.parameter("w_weight")
        if spec.pool_size is not None:
            self.w_gate, self.position_bias = weights.parameter("w_gate"), weights.parameter("position_bias")

    def __call__(
        self, x_BTD: mx.array, source_BTZ: mx.array, position_T: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries, each token's own key, or if keys are pooled that and its gates, and weights of heads."""
        spec, dtype = self.spec, x_BTD.dtype
        x_BTD, source_BTZ = mx.stop_gradient(x_BTD), mx.stop_gradient(source_BTZ)
        query_BTNH = projection.einsum("BTZ,ZNH->BTNH", source_BTZ, self.w_query.astype(dtype))
        key_BTH = self.key_norm(projection.einsum("BTD,DH->BTH", x_BTD, self.w_key.astype(dtype)))
        weight_BTN = projection.einsum("BTD,DN->BTN", x_BTD.astype(mx.float32), self.w_weight.astype(mx.float32))
        weight_BTN = weight_BTN / math.sqrt(spec.num_heads * spec.head_dim)
        match self.position:
            case RoPESpec():
                own = self.position.model_copy(update={"layout": spec.layout})
                rotate_part = rotate_first if spec.rotated == "first" else rotate_last
                query_BTNH = rotate_part(own, self.rope_head_dim, query_BTNH, position_T)
                key_BTH = rotate_part(own, self.rope_head_dim, key_BTH[:, :, None], position_T)[:, :, 0]
            case NoPositionSpec():
                pass
            case _:
                assert_never(self.position)
        if spec.pool_size is not None:
            gate_BTH = projection.einsum("BTD,DH->BTH", x_BTD, self.w_gate.astype(dtype))
            key_BTH = mx.concatenate([key_BTH, gate_BTH], axis=-1)
        return query_BTNH, key_BTH, weight_BTN

    def choose(
        self,
        drawn: tuple[mx.array, mx.array, mx.array],
        position_T: mx.array,
        position_S: mx.array,
        mask_TS: mx.array,
        documents: Documents | None,
    ) -> tuple[mx.array, mx.array]:
        """Return the index, and which of the unmasked tokens these queries choose; `drawn`: as of `__call__`."""
        query_BTNH, key_BSH, weight_BTN = drawn
        if self.spec.pool_size is None:
            index_BTS = index(query_BTNH, key_BSH, weight_BTN)
            return index_BTS, choose_sources(index_BTS, mask_TS, self.spec.top_k)
        key_BSH, gate_BSH = mx.split(key_BSH, 2, axis=-1)
        key_BSH = pool_keys(key_BSH, gate_BSH, self.position_bias, documents)
        index_BTS = index(query_BTNH, key_BSH, weight_BTN)
        return index_BTS, choose_pools(self.spec, index_BTS, position_T, position_S, mask_TS)

    def loss(
        self,
        index_BTS: mx.array,
        distribution_BTS: mx.array,
        chosen_BTS: mx.array,
        position_S: mx.array,
        documents: Documents | None,
    ) -> mx.array:
        """Return the loss of the index, of tokens or of pools."""
        if self.spec.pool_size is not None:
            distribution_BTS, chosen_BTS = pool_distribution(self.spec, distribution_BTS, chosen_BTS, position_S)
        return index_loss(index_BTS, distribution_BTS, chosen_BTS, documents)


def pool_keys(key_BSH: mx.array, gate_BSH: mx.array, bias_SH: mx.array, documents: Documents | None = None) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.pool_keys; in float32, cast back."""
    before = mx.zeros((len(key_BSH), len(bias_SH) - 1, key_BSH.shape[-1]), mx.float32)
    keys, gates = (causal_windows(x.astype(mx.float32), before, documents) for x in (key_BSH, gate_BSH))
    logits = [gate + bias for gate, bias in zip(gates, bias_SH.astype(mx.float32), strict=True)]
    pooled_BSH = mx.sum(mx.softmax(mx.stack(logits), axis=0) * mx.stack(keys), axis=0)
    return pooled_BSH.astype(key_BSH.dtype)


def choose_pools(
    spec: IndexerSpec, index_BTS: mx.array, position_T: mx.array, position_S: mx.array, mask_TS: mx.array
) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.choose_pools."""
    assert spec.pool_size is not None
    return choose_complete(index_BTS, spec.pool_size, spec.top_k // spec.pool_size, position_T, position_S, mask_TS)


def pool_distribution(
    spec: IndexerSpec, distribution_BTS: mx.array, chosen_BTS: mx.array, position_S: mx.array
) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.sparse_attention.pool_distribution."""
    assert spec.pool_size is not None
    end_BTS = chosen_BTS & (position_S % spec.pool_size == spec.pool_size - 1)[..., None, :]
    alone_BTS = ~mx.any(end_BTS, axis=-1, keepdims=True) & (mx.arange(position_S.shape[-1]) == 0)
    distribution_BST = mx.swapaxes(distribution_BTS, 1, 2)
    before = mx.zeros((len(distribution_BST), spec.pool_size - 1, distribution_BST.shape[-1]), mx.float32)
    mass_BST = sum(causal_windows(distribution_BST, before), mx.array(0.0))
    mass_BTS = mx.where(alone_BTS, 1.0, mx.where(end_BTS, mx.swapaxes(mass_BST, 1, 2), 0.0))
    return mass_BTS / mx.maximum(mx.sum(mass_BTS, axis=-1, keepdims=True), 1e-30), end_BTS | alone_BTS


class BlockIndexer(nn.Module):
    """Spec: moezoo.core.reference.sparse_attention.block_indexer."""

    def __init__(self, spec: BlockIndexerSpec, position: PositionSpec, head_dim: int, weights: Weights):
        super().__init__()
        self.spec, self.position, self.head_dim = spec, position, head_dim
        self.w_query = weights.parameter("w_query")
        self.w_key = weights.parameter("w_key")
        self.query_norm = norm(spec.norm, weights.inside("query_norm"))
        self.key_norm = norm(spec.norm, weights.inside("key_norm"))

    def __call__(
        self,
        x_BTD: mx.array,
        position_T: mx.array,
        cache: Any,
        first_B: mx.array | None,
        documents: Documents | None,
    ) -> tuple["BlockIndex", Any]:
        """Return what these tokens choose blocks by, those in the cache included; and the cache with the new ones."""
        dtype, x_BTD, has_keys = x_BTD.dtype, mx.stop_gradient(x_BTD), self.spec.pooled == "keys"
        query_BTNH = self.query_norm(projection.einsum("BTD,DNH->BTNH", x_BTD, self.w_query.astype(dtype)))
        key_BSH = projection.einsum("BTD,DH->BTH", x_BTD, self.w_key.astype(dtype))
        if not has_keys:
            key_BSH = self._rotated(self.key_norm(key_BSH)[:, :, None], position_T)[:, :, 0]
        if isinstance(cache, IndexedCache):
            cache, key_BSH = cache.with_index(key_BSH)
        position_S = positions(key_BSH.shape[1], 0, first_B, documents)
        key_BSH = self.block_keys(key_BSH, position_S) if has_keys else key_BSH
        places = places_of_blocks(self.spec, position_T, position_S, documents)
        return BlockIndex(self.spec, self._rotated(query_BTNH, position_T), key_BSH, *places), cache

    def block_keys(self, key_BSH: mx.array, position_S: mx.array) -> mx.array:
        """Return the keys of complete blocks in order, then some of no use: [B, E, H]; means in float32, cast back."""
        size, (batch, length, width) = self.spec.block_size, key_BSH.shape
        number = -(-length // size)
        if position_S.ndim == 1:
            first_E = size * mx.arange(number)
            key_BSH = mx.pad(key_BSH, [(0, 0), (0, number * size - length), (0, 0)])
        else:
            last_BE = mx.argsort(~_is_last(size, position_S), axis=-1)[:, :number]
            first_E = mx.maximum(mx.take_along_axis(position_S, last_BE, axis=1) - size + 1, 0)
            slot_BES = mx.maximum(last_BE[..., None] + mx.arange(1 - size, 1), 0)
            key_BSH = mx.take_along_axis(key_BSH, slot_BES.reshape(batch, -1, 1), axis=1)
        mean_BEH = mx.mean(key_BSH.reshape(batch, number, size, width).astype(mx.float32), axis=2)
        return self._rotated(self.key_norm(mean_BEH.astype(key_BSH.dtype))[:, :, None], first_E)[:, :, 0]

    def _rotated(self, x_BTNH: mx.array, position_T: mx.array) -> mx.array:
        match self.position:
            case RoPESpec():
                return rotate_first(*head_rotation(self.position, self.head_dim), x_BTNH, position_T)
            case NoPositionSpec():
                return x_BTNH
            case _:
                assert_never(self.position)


def choose_complete(
    index_BTS: mx.array, size: int, number: int, position_T: mx.array, position_S: mx.array, mask_TS: mx.array
) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.choose_complete; padding, at negative positions, sees all of it."""
    ends_TS = mask_TS & (position_S % size == size - 1)[..., None, :]
    chosen_BTS = choose_sources(index_BTS, ends_TS, number)
    places = mx.arange(position_S.shape[-1])
    end = mx.minimum(places + size - 1 - position_S % size, places[-1])[..., None, :]
    chosen_BTS = mx.take_along_axis(chosen_BTS, mx.broadcast_to(end, chosen_BTS.shape), axis=-1)
    complete_T1 = ((position_T + 1) // size * size)[..., None]
    behind_TS = (position_S[..., None, :] >= complete_T1) | (position_T < 0)[..., None]
    return mask_TS & (chosen_BTS | behind_TS)


class BlockIndex(NamedTuple):
    """Queries of index heads, and keys of blocks [B, E, H] or of tokens [B, S, H]; and where both are.

    `block_S`: the number of each token's block. `own_T`: that of the block which each query is in, behind complete
    ones; `first_T`: that of the first one of its document. With padding or documents: [B, S] and [B, T].
    """

    spec: BlockIndexerSpec
    query_BTNH: mx.array
    key_BSH: mx.array
    block_S: mx.array
    own_T: mx.array
    first_T: mx.array

    def chosen(self, masks: Sequence[mx.array]) -> "Blocks":
        """Return what all queries choose; `masks` [T, S] or [B, T, S]: those of their chunks, over the first tokens."""
        if self.spec.pooled == "keys":
            return Blocks(choose_blocks(self), self.block_S, self.spec.block_size)
        return Blocks(choose_highest_blocks(self, masks), self.block_S, self.spec.block_size)


class Blocks(NamedTuple):
    """The blocks that each query attends to, [B, T, E] or by head [B, M, T, E]; and the block of each token."""

    chosen_BTE: mx.array
    block_S: mx.array
    size: int

    def tokens(self, mask_TS: mx.array, rows: slice = slice(None)) -> mx.array:
        """Return which of the first S tokens these queries attend to, of those that they may see."""
        chosen_BTE, length = self.chosen_BTE[..., rows, :], mask_TS.shape[-1]
        if self.block_S.ndim == 1:
            chosen_BTS = mx.repeat(chosen_BTE[..., : -(-length // self.size)], self.size, axis=-1)[..., :length]
        else:
            block_B1S = self.block_S[:, None, :length]
            chosen_BTS = mx.take_along_axis(chosen_BTE, _by_head(block_B1S, chosen_BTE), axis=-1)
        return chosen_BTS & _by_head(mask_TS, chosen_BTE)


def _by_head(mask_TS: mx.array, other: mx.array) -> mx.array:
    """Return an array [T, S], or one for each sequence, with an axis for heads if the other one has it."""
    return mask_TS[:, None] if mask_TS.ndim == 3 and other.ndim == 4 else mask_TS


def places_of_blocks(
    spec: BlockIndexerSpec, position_T: mx.array, position_S: mx.array, documents: Documents | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the last three fields of a `BlockIndex`.

    Blocks with keys are numbered over all documents; others in each, since a query sees no tokens but of its own.
    Padding, at negative positions, is in block 0, of which only padding sees it.
    """
    size, first_T = spec.block_size, mx.zeros_like(position_T)
    block_S = mx.maximum(position_S, 0) // size
    if spec.pooled == "scores":
        return block_S, mx.maximum(position_T, 0) // size, first_T
    complete_T = mx.maximum(position_T + 1, 0) // size
    if documents is None:
        return block_S, complete_T, first_T
    is_last_BT = _is_last(size, position_S)
    own_BT = mx.cumsum(is_last_BT, axis=-1)
    return own_BT - is_last_BT, own_BT, own_BT - complete_T


def _is_last(size: int, position_BS: mx.array) -> mx.array:
    """Return which tokens are the last of a block."""
    return (position_BS >= 0) & (position_BS % size == size - 1)


def choose_blocks(found: BlockIndex) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.choose_blocks; what is behind them is one more: bool [B, T, E]."""
    weight_BTN = mx.full(found.query_BTNH.shape[:3], 1 / math.sqrt(found.spec.head_dim), mx.float32)
    index_BTE = index(found.query_BTNH, found.key_BSH, weight_BTN)
    block_E, own_T1 = mx.arange(index_BTE.shape[-1]), found.own_T[..., None]
    complete_TE = (block_E >= found.first_T[..., None]) & (block_E < own_T1)
    return choose_sources(index_BTE, complete_TE, found.spec.top_k) | (block_E == own_T1)


def choose_highest_blocks(found: BlockIndex, masks: Sequence[mx.array]) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.choose_highest_blocks; of blocks: bool [B, M, T, E]."""
    number, start, scores = -(-found.key_BSH.shape[1] // found.spec.block_size), 0, []
    for mask_TS in masks:
        end, seen = start + mask_TS.shape[-2], slice(0, mask_TS.shape[-1])
        own = found._replace(
            query_BTNH=found.query_BTNH[:, start:end], key_BSH=found.key_BSH[:, seen], block_S=found.block_S[..., seen]
        )
        scores.append(block_scores(own, mask_TS, number))
        start = end
    score_BMTE = mx.concatenate(scores, axis=2)
    near_TE = found.own_T[..., None] - mx.arange(number) < found.spec.local_blocks
    ranked_BMTE = mx.where(_by_head(near_TE, score_BMTE), mx.inf, score_BMTE)
    return choose_sources(ranked_BMTE, score_BMTE > -mx.inf, found.spec.top_k)


def block_scores(found: BlockIndex, mask_TS: mx.array, number: int) -> mx.array:
    """Return the largest score of each block's unmasked tokens, -inf of none: [B, M, T, E], in float32.

    Queries come last until then: a maximum over the last axis has no vectors on a CPU.
    """
    size, (batch, length) = found.spec.block_size, found.key_BSH.shape[:2]
    query_BTMH, key_BSH = found.query_BTNH.astype(mx.float32), found.key_BSH.astype(mx.float32)
    score_BMST = mx.einsum("BTMH,BSH->BMST", query_BTMH, key_BSH)
    mask_ST = _by_head(mask_TS, score_BMST).swapaxes(-1, -2)
    score_BMST = mx.where(mask_ST, mx.stop_gradient(score_BMST), -mx.inf)
    if found.block_S.ndim == 1:
        seen, (*lead, _, width) = -(-length // size), score_BMST.shape
        behind = [(0, 0), (0, 0), (0, seen * size - length), (0, 0)]
        whole_BMST = mx.pad(score_BMST, behind, constant_values=-mx.inf)
        block_BMET = mx.max(whole_BMST.reshape(*lead, seen, size, width), axis=-2)
        behind = [(0, 0), (0, 0), (0, number - seen), (0, 0)]
        return mx.pad(block_BMET, behind, constant_values=-mx.inf).swapaxes(-1, -2)
    score_BSMT = mx.moveaxis(score_BMST, 2, 1)
    lowest_BEMT = mx.full((batch, number, *score_BSMT.shape[2:]), -mx.inf, mx.float32)
    return mx.moveaxis(lowest_BEMT.at[mx.arange(batch)[:, None], found.block_S].maximum(score_BSMT), 1, 3)


def head_rotation(position: RoPESpec, head_dim: int) -> tuple[RoPESpec, int]:
    """Spec: moezoo.core.reference.sparse_attention.head_rotation."""
    return reference.head_rotation(position, head_dim)


def rotate_first(position: RoPESpec, rope_head_dim: int, x_BTNH: mx.array, position_T: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.rotate_first."""
    rotated = rotate(position, x_BTNH[..., :rope_head_dim], position_T)
    return mx.concatenate([rotated, x_BTNH[..., rope_head_dim:]], axis=-1)


def rotate_last(position: RoPESpec, rope_head_dim: int, x_BTNH: mx.array, position_T: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.rotate_last."""
    start = x_BTNH.shape[-1] - rope_head_dim
    rotated = rotate(position, x_BTNH[..., start:], position_T)
    return mx.concatenate([x_BTNH[..., :start], rotated], axis=-1)


def index(query_BTNH: mx.array, key_BSH: mx.array, weight_BTN: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.index."""
    # Trap: a product of bfloat16 arrays would be rounded to bfloat16.
    score_BTNS = mx.einsum("BTNH,BSH->BTNS", query_BTNH.astype(mx.float32), key_BSH.astype(mx.float32))
    return mx.einsum("BTN,BTNS->BTS", weight_BTN, nn.relu(score_BTNS))


def choose_sources(index_BTS: mx.array, mask_TS: mx.array, top_k: int) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.choose_sources; by a partition, which takes no sort."""
    place = index_BTS.shape[-1] - top_k
    if place <= 0:
        return mx.broadcast_to(mask_TS, mx.broadcast_shapes(mask_TS.shape, index_BTS.shape))
    allowed = mx.where(mask_TS, mx.stop_gradient(index_BTS), -mx.inf)
    lowest_BT1 = mx.partition(allowed, place, axis=-1)[..., place : place + 1]
    above_BTS, tied_BTS = allowed > lowest_BT1, allowed == lowest_BT1
    left_BT1 = top_k - mx.sum(above_BTS, axis=-1, keepdims=True)
    return mask_TS & (above_BTS | (tied_BTS & (mx.cumsum(tied_BTS.astype(mx.int32), axis=-1) <= left_BT1)))


def attend_where(
    query_BTMGH: mx.array,
    key_BSMH: mx.array,
    value_BSMH: mx.array,
    mask_BTS: mx.array,
    scale: float,
    sink_N: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.sparse_attention.attend_where; fused kernels do not return weights."""
    dtype = query_BTMGH.dtype
    query_BTMGH, key_BSMH, value_BSMH = (x.astype(mx.float32) for x in (query_BTMGH, key_BSMH, value_BSMH))
    score = scale * mx.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH)
    score = mx.where(mask_BTS[:, None, None], score, -mx.inf)
    if sink_N is not None:
        sink_MG11 = mx.broadcast_to(sink_N.reshape(*query_BTMGH.shape[2:4], 1, 1), (*score.shape[:-1], 1))
        score = mx.concatenate([score, sink_MG11], axis=-1)
    weight = mx.softmax(score, axis=-1, precise=True)[..., : key_BSMH.shape[1]]
    distribution_BTS = mx.stop_gradient(mx.mean(weight, axis=(1, 2)))
    if sink_N is not None:
        distribution_BTS = distribution_BTS / mx.sum(distribution_BTS, axis=-1, keepdims=True)
    attended = mx.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH)
    return attended.astype(dtype), distribution_BTS


def index_loss(
    index_BTS: mx.array, distribution_BTS: mx.array, mask_BTS: mx.array, documents: Documents | None = None
) -> mx.array:
    """Spec: moezoo.core.reference.sparse_attention.index_loss; computed as `sum p (q/p - 1 - log(q/p))`.

    This is equal, since both distributions sum to 1. Its terms are not negative and vanish to second order where q
    nears p, so nothing cancels; the sum of `p log(p/q)` would be left with the rounding errors of its terms.
    """
    logits = mx.where(mask_BTS, index_BTS, -mx.inf)
    # Underflowed weights are raised to 1e-30, so that their term is q, which the sum would otherwise lack.
    p_BTS = mx.maximum(distribution_BTS, 1e-30)
    log_softmax_BTS = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    log_ratio_BTS = mx.where(mask_BTS, log_softmax_BTS - mx.log(p_BTS), 0.0)
    divergence_BT = mx.sum(p_BTS * (mx.expm1(log_ratio_BTS) - log_ratio_BTS), axis=-1)
    return token_mean(divergence_BT.reshape(-1), None if documents is None else documents.real_P)
