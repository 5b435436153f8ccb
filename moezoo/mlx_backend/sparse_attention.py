"""Sparse attention to the tokens that an indexer chooses. Spec: moezoo.core.reference.sparse_attention."""

import math
from typing import assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import IndexerSpec, NoPositionSpec, PositionSpec, RoPESpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, rotate, token_mean


class Indexer(nn.Module):
    """Spec: moezoo.core.reference.sparse_attention.indexer."""

    def __init__(self, spec: IndexerSpec, position: PositionSpec, rope_head_dim: int, weights: Weights):
        super().__init__()
        self.spec, self.position, self.rope_head_dim = spec, position, rope_head_dim
        self.w_query = weights.parameter("w_query")
        self.w_key = weights.parameter("w_key")
        self.key_norm = norm(spec.key_norm, weights.inside("key_norm"))
        self.w_weight = weights.parameter("w_weight")

    def __call__(
        self, x_BTD: mx.array, source_BTZ: mx.array, position_T: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
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
        return query_BTNH, key_BTH, weight_BTN


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
    """Spec: moezoo.core.reference.sparse_attention.choose_sources."""
    allowed = mx.where(mask_TS, mx.stop_gradient(index_BTS), -mx.inf)
    rank_BTS = mx.argsort(mx.argsort(-allowed, axis=-1), axis=-1)
    return (rank_BTS < top_k) & mask_TS


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
