"""Sparse attention to the tokens that an indexer chooses. Spec: moezoo.core.reference.sparse_attention."""

import math
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moezoo.core.reference import sparse_attention as reference
from moezoo.core.spec import BlockIndexerSpec, IndexerSpec, NoPositionSpec, PositionSpec, RoPESpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.kv_cache import IndexedCache
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.positions import Documents, causal_windows, rotate, token_mean, within_documents


class Indexer(nnx.Module):
    """Spec: moezoo.core.reference.sparse_attention.indexer."""

    def __init__(self, spec: IndexerSpec, position: PositionSpec, rope_head_dim: int, weights: Weights):
        self.spec, self.position, self.rope_head_dim = spec, position, rope_head_dim
        self.w_query = weights.parameter("w_query")
        self.w_key = weights.parameter("w_key")
        self.key_norm = norm(spec.key_norm, weights.inside("key_norm"))
        self.w_weight = weights.parameter("w_weight")
        if spec.pool_size is not None:
            self.w_gate, self.position_bias = weights.parameter("w_gate"), weights.parameter("position_bias")

    def __call__(
        self, x_BTD: jax.Array, source_BTZ: jax.Array, position_T: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, each token's own key, or if keys are pooled that and its gates, and weights of heads."""
        spec, dtype = self.spec, x_BTD.dtype
        x_BTD, source_BTZ = lax.stop_gradient(x_BTD), lax.stop_gradient(source_BTZ)
        query_BTNH = projection.einsum("BTZ,ZNH->BTNH", source_BTZ, self.w_query[...].astype(dtype))
        key_BTH = self.key_norm(projection.einsum("BTD,DH->BTH", x_BTD, self.w_key[...].astype(dtype)))
        weight_BTN = projection.einsum("BTD,DN->BTN", x_BTD.astype(jnp.float32), self.w_weight[...].astype(jnp.float32))
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
            gate_BTH = projection.einsum("BTD,DH->BTH", x_BTD, self.w_gate[...].astype(dtype))
            key_BTH = jnp.concatenate([key_BTH, gate_BTH], axis=-1)
        return query_BTNH, key_BTH, weight_BTN

    def choose(
        self,
        drawn: tuple[jax.Array, jax.Array, jax.Array],
        position_T: jax.Array,
        position_S: jax.Array,
        mask_TS: jax.Array,
        documents: Documents | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the index, and which of the unmasked tokens these queries choose; `drawn`: as of `__call__`."""
        query_BTNH, key_BSH, weight_BTN = drawn
        if self.spec.pool_size is None:
            index_BTS = index(query_BTNH, key_BSH, weight_BTN)
            return index_BTS, choose_sources(index_BTS, mask_TS, self.spec.top_k)
        key_BSH, gate_BSH = jnp.split(key_BSH, 2, axis=-1)
        key_BSH = pool_keys(key_BSH, gate_BSH, self.position_bias[...], documents)
        index_BTS = index(query_BTNH, key_BSH, weight_BTN)
        return index_BTS, choose_pools(self.spec, index_BTS, position_T, position_S, mask_TS)

    def loss(
        self,
        index_BTS: jax.Array,
        distribution_BTS: jax.Array,
        chosen_BTS: jax.Array,
        position_S: jax.Array,
        documents: Documents | None,
    ) -> jax.Array:
        """Return the loss of the index, of tokens or of pools."""
        if self.spec.pool_size is not None:
            distribution_BTS, chosen_BTS = pool_distribution(self.spec, distribution_BTS, chosen_BTS, position_S)
        return index_loss(index_BTS, distribution_BTS, chosen_BTS, documents)


def pool_keys(
    key_BSH: jax.Array, gate_BSH: jax.Array, bias_SH: jax.Array, documents: Documents | None = None
) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.pool_keys; in float32, cast back."""
    before = jnp.zeros((len(key_BSH), len(bias_SH) - 1, key_BSH.shape[-1]), jnp.float32)
    keys, gates = (causal_windows(x.astype(jnp.float32), before, documents) for x in (key_BSH, gate_BSH))
    logits = [gate + bias for gate, bias in zip(gates, bias_SH.astype(jnp.float32), strict=True)]
    pooled_BSH = jnp.sum(jax.nn.softmax(jnp.stack(logits), axis=0) * jnp.stack(keys), axis=0)
    return pooled_BSH.astype(key_BSH.dtype)


def choose_pools(
    spec: IndexerSpec, index_BTS: jax.Array, position_T: jax.Array, position_S: jax.Array, mask_TS: jax.Array
) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.choose_pools."""
    assert spec.pool_size is not None
    return choose_complete(index_BTS, spec.pool_size, spec.top_k // spec.pool_size, position_T, position_S, mask_TS)


def pool_distribution(
    spec: IndexerSpec, distribution_BTS: jax.Array, chosen_BTS: jax.Array, position_S: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.sparse_attention.pool_distribution."""
    assert spec.pool_size is not None
    end_BTS = chosen_BTS & (position_S % spec.pool_size == spec.pool_size - 1)[..., None, :]
    alone_BTS = ~jnp.any(end_BTS, axis=-1, keepdims=True) & (jnp.arange(position_S.shape[-1]) == 0)
    distribution_BST = jnp.swapaxes(distribution_BTS, 1, 2)
    before = jnp.zeros((len(distribution_BST), spec.pool_size - 1, distribution_BST.shape[-1]), jnp.float32)
    mass_BST = sum(causal_windows(distribution_BST, before), jnp.float32(0))
    mass_BTS = jnp.where(alone_BTS, 1.0, jnp.where(end_BTS, jnp.swapaxes(mass_BST, 1, 2), 0.0))
    return mass_BTS / jnp.maximum(jnp.sum(mass_BTS, axis=-1, keepdims=True), 1e-30), end_BTS | alone_BTS


class BlockIndexer(nnx.Module):
    """Spec: moezoo.core.reference.sparse_attention.block_indexer."""

    def __init__(self, spec: BlockIndexerSpec, position: PositionSpec, head_dim: int, weights: Weights):
        self.spec, self.position, self.head_dim = spec, position, head_dim
        self.w_query = weights.parameter("w_query")
        self.w_key = weights.parameter("w_key")
        self.query_norm = norm(spec.norm, weights.inside("query_norm"))
        self.key_norm = norm(spec.norm, weights.inside("key_norm"))

    def __call__(self, x_BTD: jax.Array, position_T: jax.Array, cache: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """Return queries and each token's own key, those of cached ones before; and the cache with the new ones."""
        dtype, x_BTD = x_BTD.dtype, lax.stop_gradient(x_BTD)
        query_BTNH = self.query_norm(projection.einsum("BTD,DNH->BTNH", x_BTD, self.w_query[...].astype(dtype)))
        key_BTH = projection.einsum("BTD,DH->BTH", x_BTD, self.w_key[...].astype(dtype))
        if self.spec.pooled == "scores":
            key_BTH = self._rotated(self.key_norm(key_BTH)[:, :, None], position_T)[:, :, 0]
        if isinstance(cache, IndexedCache):
            cache, key_BTH = cache.with_index(key_BTH)
        return (self._rotated(query_BTNH, position_T), key_BTH), cache

    def chosen(
        self,
        index: tuple[jax.Array, jax.Array],
        position_T: jax.Array,
        position_S: jax.Array,
        mask_TS: jax.Array,
        documents: Documents | None,
    ) -> jax.Array:
        """Return which of the unmasked tokens these queries choose, by the keys of tokens: as `choose_blocks`."""
        key_BSH = index[1]
        if self.spec.pooled == "keys":
            key_BSH = self.block_keys(key_BSH, position_S, documents)
        mask_TS = within_documents(mask_TS, documents)
        return choose_blocks(self.spec, index[0], key_BSH, position_T, position_S, mask_TS)

    def block_keys(self, key_BSH: jax.Array, position_S: jax.Array, documents: Documents | None = None) -> jax.Array:
        """Return at each token the key of the block that ends there; means in float32, cast back."""
        size, (batch, _, width) = self.spec.block_size, key_BSH.shape
        before = jnp.zeros((batch, size - 1, width), jnp.float32)
        mean_BSH = sum(causal_windows(key_BSH.astype(jnp.float32), before, documents), jnp.float32(0)) / size
        keys_BSH = self.key_norm(mean_BSH.astype(key_BSH.dtype))
        return self._rotated(keys_BSH[:, :, None], jnp.maximum(position_S - size + 1, 0))[:, :, 0]

    def _rotated(self, x_BTNH: jax.Array, position_T: jax.Array) -> jax.Array:
        match self.position:
            case RoPESpec():
                return rotate_first(*head_rotation(self.position, self.head_dim), x_BTNH, position_T)
            case NoPositionSpec():
                return x_BTNH
            case _:
                assert_never(self.position)


def choose_blocks(
    spec: BlockIndexerSpec,
    query_BTNH: jax.Array,
    key_BSH: jax.Array,
    position_T: jax.Array,
    position_S: jax.Array,
    mask_TS: jax.Array,
) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.choose_blocks."""
    if spec.pooled == "scores":
        return choose_highest_blocks(spec, query_BTNH, key_BSH, position_T, position_S, mask_TS)
    weight_BTN = jnp.full(query_BTNH.shape[:3], 1 / math.sqrt(spec.head_dim), jnp.float32)
    index_BTS = index(query_BTNH, key_BSH, weight_BTN)
    return choose_complete(index_BTS, spec.block_size, spec.top_k, position_T, position_S, mask_TS)


def choose_complete(
    index_BTS: jax.Array, size: int, number: int, position_T: jax.Array, position_S: jax.Array, mask_TS: jax.Array
) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.choose_complete; padding, at negative positions, sees all of it."""
    ends_TS = mask_TS & (position_S % size == size - 1)[..., None, :]
    chosen_BTS = choose_sources(index_BTS, ends_TS, number)
    places = jnp.arange(position_S.shape[-1])
    end = jnp.minimum(places + size - 1 - position_S % size, places[-1])[..., None, :]
    chosen_BTS = jnp.take_along_axis(chosen_BTS, jnp.broadcast_to(end, chosen_BTS.shape), axis=-1)
    complete_T1 = ((position_T + 1) // size * size)[..., None]
    behind_TS = (position_S[..., None, :] >= complete_T1) | (position_T < 0)[..., None]
    return mask_TS & (chosen_BTS | behind_TS)


def choose_highest_blocks(
    spec: BlockIndexerSpec,
    query_BTMH: jax.Array,
    key_BSH: jax.Array,
    position_T: jax.Array,
    position_S: jax.Array,
    mask_TS: jax.Array,
) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.choose_highest_blocks."""
    size, (batch, length) = spec.block_size, key_BSH.shape[:2]
    score_BMTS = jnp.einsum("BTMH,BSH->BMTS", query_BTMH, key_BSH, preferred_element_type=jnp.float32)
    score_BMTS = lax.stop_gradient(score_BMTS)
    first_BS = jnp.broadcast_to(jnp.maximum(jnp.arange(length) - position_S % size, 0), (batch, length))
    near_TS = position_T[..., :, None] // size - position_S[..., None, :] // size < spec.local_blocks
    score_BMTS = jnp.where(_by_head(near_TS), jnp.inf, score_BMTS)
    score_BSMT = jnp.moveaxis(jnp.where(_by_head(mask_TS), score_BMTS, -jnp.inf), 3, 1)
    block_BSMT = jnp.full_like(score_BSMT, -jnp.inf).at[jnp.arange(batch)[:, None], first_BS].max(score_BSMT)
    block_BMTS = jnp.moveaxis(block_BSMT, 1, 3)
    chosen_BMTS = choose_sources(block_BMTS, block_BMTS > -jnp.inf, spec.top_k)
    first_BMTS = jnp.broadcast_to(first_BS[:, None, None], chosen_BMTS.shape)
    return _by_head(mask_TS) & jnp.take_along_axis(chosen_BMTS, first_BMTS, axis=-1)


def _by_head(mask_TS: jax.Array) -> jax.Array:
    """Return a mask [T, S], or one for each sequence, with an axis for heads."""
    return mask_TS if mask_TS.ndim == 2 else mask_TS[:, None]


def head_rotation(position: RoPESpec, head_dim: int) -> tuple[RoPESpec, int]:
    """Spec: moezoo.core.reference.sparse_attention.head_rotation."""
    return reference.head_rotation(position, head_dim)


def rotate_first(position: RoPESpec, rope_head_dim: int, x_BTNH: jax.Array, position_T: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.rotate_first."""
    rotated = rotate(position, x_BTNH[..., :rope_head_dim], position_T)
    return jnp.concatenate([rotated, x_BTNH[..., rope_head_dim:]], axis=-1)


def rotate_last(position: RoPESpec, rope_head_dim: int, x_BTNH: jax.Array, position_T: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.rotate_last."""
    start = x_BTNH.shape[-1] - rope_head_dim
    rotated = rotate(position, x_BTNH[..., start:], position_T)
    return jnp.concatenate([x_BTNH[..., :start], rotated], axis=-1)


def index(query_BTNH: jax.Array, key_BSH: jax.Array, weight_BTN: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.index."""
    score_BTNS = jnp.einsum("BTNH,BSH->BTNS", query_BTNH, key_BSH, preferred_element_type=jnp.float32)
    return jnp.einsum("BTN,BTNS->BTS", weight_BTN, jax.nn.relu(score_BTNS))


def choose_sources(index_BTS: jax.Array, mask_TS: jax.Array, top_k: int) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.choose_sources."""
    allowed = jnp.where(mask_TS, lax.stop_gradient(index_BTS), -jnp.inf)
    rank_BTS = jnp.argsort(jnp.argsort(-allowed, axis=-1, stable=True), axis=-1)
    return (rank_BTS < top_k) & mask_TS


def attend_where(
    query_BTMGH: jax.Array,
    key_BSMH: jax.Array,
    value_BSMH: jax.Array,
    mask_BTS: jax.Array,
    scale: float,
    sink_N: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.sparse_attention.attend_where."""
    score = scale * jnp.einsum("BTMGH,BSMH->BMGTS", query_BTMGH, key_BSMH, preferred_element_type=jnp.float32)
    score = jnp.where(mask_BTS[:, None, None], score, -jnp.inf)
    if sink_N is not None:
        sink_MG11 = jnp.broadcast_to(sink_N.reshape(*query_BTMGH.shape[2:4], 1, 1), (*score.shape[:-1], 1))
        score = jnp.concatenate([score, sink_MG11], axis=-1)
    weight = jax.nn.softmax(score, axis=-1)[..., : key_BSMH.shape[1]]
    distribution_BTS = lax.stop_gradient(jnp.mean(weight, axis=(1, 2)))
    if sink_N is not None:
        distribution_BTS = distribution_BTS / jnp.sum(distribution_BTS, axis=-1, keepdims=True)
    weight = weight.astype(value_BSMH.dtype)
    attended = jnp.einsum("BMGTS,BSMH->BTMGH", weight, value_BSMH, preferred_element_type=jnp.float32)
    return attended.astype(value_BSMH.dtype), distribution_BTS


def index_loss(
    index_BTS: jax.Array, distribution_BTS: jax.Array, mask_BTS: jax.Array, documents: Documents | None = None
) -> jax.Array:
    """Spec: moezoo.core.reference.sparse_attention.index_loss; computed as `sum p (q/p - 1 - log(q/p))`.

    This is equal, since both distributions sum to 1. Its terms are not negative and vanish to second order where q
    nears p, so nothing cancels; the sum of `p log(p/q)` would be left with the rounding errors of its terms.
    """
    logits = jnp.where(mask_BTS, index_BTS, -jnp.inf)
    # Underflowed weights are raised to 1e-30, so that their term is q, which the sum would otherwise lack.
    p_BTS = jnp.maximum(distribution_BTS, 1e-30)
    log_ratio_BTS = jnp.where(mask_BTS, jax.nn.log_softmax(logits, axis=-1) - jnp.log(p_BTS), 0.0)
    divergence_BT = jnp.sum(p_BTS * (jnp.expm1(log_ratio_BTS) - log_ratio_BTS), axis=-1)
    return token_mean(divergence_BT.reshape(-1), None if documents is None else documents.real_P)
