"""Linear attention with a recurrent state. Spec: moezoo.core.reference.delta_attention."""

import math

import mlx.core as mx
from mlx import nn

from moezoo.core.reference.linear_recurrence import FORGETS
from moezoo.core.spec import GatedDeltaAttentionSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.convolution import causal_convolution
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kv_cache import Attended, RecurrentCache, empty_recurrent_cache
from moezoo.mlx_backend.linear_recurrence import decays, in_chunks
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, positions
from moezoo.mlx_backend.runtime.typed import custom_function

CHUNK = 32
"""Chunk length in tokens: half as long makes products small, twice as long makes triangular systems large."""


class GatedDeltaAttention(nn.Module):
    """Spec: moezoo.core.reference.delta_attention.gated_delta_attention; with a cache, for the next tokens."""

    def __init__(self, spec: GatedDeltaAttentionSpec, weights: Weights, layer: int):
        super().__init__()
        del layer  # all layers are alike
        self.spec = spec
        self.w_query = weights.parameter("w_query")
        self.conv_query = weights.parameter("conv_query")
        self.w_key = weights.parameter("w_key")
        self.conv_key = weights.parameter("conv_key")
        self.w_value = weights.parameter("w_value")
        self.conv_value = weights.parameter("conv_value")
        self.w_gate = weights.parameter("w_gate")
        self.w_beta = weights.parameter("w_beta")
        self.w_decay = weights.parameter("w_decay")
        self.decay_bias = weights.parameter("decay_bias")
        self.log_decay_rate = weights.parameter("log_decay_rate")
        self.output_norm = norm(spec.norm, weights.inside("output_norm"))
        self.w_output = weights.parameter("w_output")

    def __call__(
        self,
        x_BTD: mx.array,
        cache: RecurrentCache | None = None,
        *,
        first_value_BTMH: mx.array | None = None,
        first_B: mx.array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        del first_value_BTMH  # only grouped-query attention uses it
        spec, dtype = self.spec, x_BTD.dtype
        query = projection.einsum("BTD,DMH->BTMH", x_BTD, self.w_query.astype(dtype))
        key = projection.einsum("BTD,DMH->BTMH", x_BTD, self.w_key.astype(dtype))
        value = projection.einsum("BTD,DNZ->BTNZ", x_BTD, self.w_value.astype(dtype))
        gate = projection.einsum("BTD,DNZ->BTNZ", x_BTD, self.w_gate.astype(dtype)).astype(mx.float32)
        beta = mx.sigmoid(projection.einsum("BTD,DN->BTN", x_BTD, self.w_beta.astype(dtype)).astype(mx.float32))
        step = projection.einsum("BTD,DN->BTN", x_BTD, self.w_decay.astype(dtype)).astype(mx.float32)
        rate = mx.exp(self.log_decay_rate.astype(mx.float32))
        log_decay = -rate * nn.softplus(step + self.decay_bias.astype(mx.float32))
        batch, length = x_BTD.shape[:2]
        if first_B is not None:  # padding keeps a state of zeros, and is zero as an input of the convolutions
            real_BT1 = positions(length, 0 if cache is None else cache.length, first_B)[..., None] >= 0
            beta, log_decay = mx.where(real_BT1, beta, 0.0), mx.where(real_BT1, log_decay, 0.0)
            query, key, value = (mx.where(real_BT1[..., None], x, 0).astype(dtype) for x in (query, key, value))
        if documents is not None:
            log_decay = mx.where(documents.position_BT[..., None] == 0, FORGETS, log_decay)
        past = empty_recurrent_cache(spec, batch, dtype) if cache is None else cache
        grouped = (batch, length, spec.num_key_heads, -1)
        attended, state_BMGHZ = gated_delta_rule(
            unit(nn.silu(causal_convolution(query, self.conv_query, past.query_BSMH, documents)))
            / math.sqrt(spec.key_head_dim),
            unit(nn.silu(causal_convolution(key, self.conv_key, past.key_BSMH, documents))),
            nn.silu(causal_convolution(value, self.conv_value, past.value_BSNZ, documents)).reshape(
                *grouped, spec.value_head_dim
            ),
            beta.reshape(grouped),
            log_decay.reshape(grouped),
            past.state_BMGHZ,
        )
        if cache is not None:
            cache = cache.extend(state_BMGHZ, query, key, value)
        normed = (self.output_norm(attended.reshape(value.shape)) * nn.silu(gate)).astype(dtype)
        return Attended(projection.einsum("BTNZ,NZD->BTD", normed, self.w_output.astype(dtype)), cache, None, None)


def gated_delta_rule(
    query_BTMH: mx.array,
    key_BTMH: mx.array,
    value_BTMGZ: mx.array,
    beta_BTMG: mx.array,
    log_decay_BTMG: mx.array,
    state_BMGHZ: mx.array,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.delta_attention.gated_delta_rule_in_chunks; takes a state, and returns the last one.

    All float32. One token is a chunk of one, which is the recurrence.
    """
    length = key_BTMH.shape[1]
    chunk = min(chunk, length)
    query_BMTH, key_BMTH, value_BMGTZ = (
        in_chunks(x, chunk).swapaxes(-1, -2) for x in (query_BTMH, key_BTMH, value_BTMGZ)
    )
    beta_BMGT, log_decay_BMGT = in_chunks(beta_BTMG, chunk), in_chunks(log_decay_BTMG, chunk)
    decay_BMGTS, decay_BMGT1 = decays(log_decay_BMGT)
    overlap_BMTS = mx.einsum("...MTH,...MSH->...MTS", key_BMTH, key_BMTH)
    score_BMTS = mx.einsum("...MTH,...MSH->...MTS", query_BMTH, key_BMTH)
    lower_BMGTS = mx.tril(beta_BMGT[..., None] * decay_BMGTS * overlap_BMTS[..., None, :, :], -1)
    inverse_BMGTS = _inverse_of_one_plus(lower_BMGTS)
    score_BMGTS = decay_BMGTS * score_BMTS[..., None, :, :]

    def one_chunk(state_BMGHZ: mx.array, parts: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
        query_BMTH, key_BMTH, value_BMGTZ, beta_BMGT, decay_BMGTS, decay_BMGT1, inverse_BMGTS, score_BMGTS = parts
        known_BMGTZ = decay_BMGT1 * mx.einsum("BMTH,BMGHZ->BMGTZ", key_BMTH, state_BMGHZ)
        wanted_BMGTZ = beta_BMGT[..., None] * (value_BMGTZ - known_BMGTZ)
        change_BMGTZ = mx.einsum("BMGTS,BMGSZ->BMGTZ", inverse_BMGTS, wanted_BMGTZ)
        read_BMGTZ = decay_BMGT1 * mx.einsum("BMTH,BMGHZ->BMGTZ", query_BMTH, state_BMGHZ)
        read_BMGTZ = read_BMGTZ + mx.einsum("BMGTS,BMGSZ->BMGTZ", score_BMGTS, change_BMGTZ)
        decayed_change_BMGTZ = decay_BMGTS[..., -1, :, None] * change_BMGTZ
        state_BMGHZ = decay_BMGT1[..., -1:, :] * state_BMGHZ
        state_BMGHZ = state_BMGHZ + mx.einsum("BMTH,BMGTZ->BMGHZ", key_BMTH, decayed_change_BMGTZ)
        return state_BMGHZ, read_BMGTZ

    parts = (query_BMTH, key_BMTH, value_BMGTZ, beta_BMGT, decay_BMGTS, decay_BMGT1, inverse_BMGTS, score_BMGTS)
    reads = []
    for index in range(len(key_BMTH)):
        state_BMGHZ, read_BMGTZ = one_chunk(state_BMGHZ, tuple(part[index] for part in parts))
        reads.append(read_BMGTZ.moveaxis(-2, 1))
    return mx.concatenate(reads, axis=1)[:, :length], state_BMGHZ


def unit(x: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.delta_attention.unit."""
    return x * mx.rsqrt(mx.sum(mx.square(x), axis=-1, keepdims=True) + 1e-6)


@custom_function
def _inverse_of_one_plus(lower: mx.array) -> mx.array:
    """Return `(1 + lower)^-1` of strictly lower triangular matrices [..., T, T], exact, from matrix products alone.

    Pairs of diagonal blocks with known inverses A' and B' are merged: [[A, 0], [C, B]] has the inverse
    [[A', 0], [-B' C A', B']]. Blocks of size one are their own inverse.
    """
    position_T = mx.arange(lower.shape[-1])

    def joining(size: int) -> mx.array:
        block_T = position_T // size
        joins_TS = (block_T[:, None] > block_T[None, :]) & (block_T[:, None] // 2 == block_T[None, :] // 2)
        return mx.where(joins_TS, lower, 0.0)

    inverse, size = mx.eye(lower.shape[-1]) - joining(1), 2
    while size < lower.shape[-1]:
        inverse = inverse - inverse @ joining(size) @ inverse
        size *= 2
    return inverse


@_inverse_of_one_plus.vjp
def _gradient_of_inverse(lower: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
    """Return the gradient by two products, instead of a gradient through each step."""
    del lower
    transposed = inverse.swapaxes(-1, -2)
    return -(transposed @ cotangent @ transposed)
