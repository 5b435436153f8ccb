"""Linear attention with a recurrent state. Spec: moezoo.core.reference.delta_attention."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moezoo.core.reference.linear_recurrence import FORGETS
from moezoo.core.spec import GatedDeltaAttentionSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.convolution import causal_convolution
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.kv_cache import Attended, RecurrentCache, empty_recurrent_cache
from moezoo.jax_backend.linear_recurrence import decays, in_chunks
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.positions import Documents, positions

CHUNK = 32
"""Chunk length in tokens: half as long makes products small, twice as long makes triangular systems large."""


class GatedDeltaAttention(nnx.Module):
    """Spec: moezoo.core.reference.delta_attention.gated_delta_attention; with a cache, for the next tokens."""

    def __init__(self, spec: GatedDeltaAttentionSpec, weights: Weights, layer: int):
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
        x_BTD: jax.Array,
        cache: RecurrentCache | None = None,
        *,
        first_value_BTMH: jax.Array | None = None,
        first_B: jax.Array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        del first_value_BTMH  # only grouped-query attention uses it
        spec, dtype = self.spec, x_BTD.dtype
        query = projection.einsum("BTD,DMH->BTMH", x_BTD, self.w_query[...].astype(dtype))
        key = projection.einsum("BTD,DMH->BTMH", x_BTD, self.w_key[...].astype(dtype))
        value = projection.einsum("BTD,DNZ->BTNZ", x_BTD, self.w_value[...].astype(dtype))
        gate = projection.einsum("BTD,DNZ->BTNZ", x_BTD, self.w_gate[...].astype(dtype)).astype(jnp.float32)
        strength = projection.einsum("BTD,DN->BTN", x_BTD, self.w_beta[...].astype(dtype)).astype(jnp.float32)
        beta = jax.nn.sigmoid(strength)
        step = projection.einsum("BTD,DN->BTN", x_BTD, self.w_decay[...].astype(dtype)).astype(jnp.float32)
        rate = jnp.exp(self.log_decay_rate[...].astype(jnp.float32))
        log_decay = -rate * jax.nn.softplus(step + self.decay_bias[...].astype(jnp.float32))
        batch, length = x_BTD.shape[:2]
        if first_B is not None:  # padding keeps a state of zeros, and is zero as an input of the convolutions
            real_BT1 = positions(length, 0 if cache is None else cache.length, first_B)[..., None] >= 0
            beta, log_decay = jnp.where(real_BT1, beta, 0.0), jnp.where(real_BT1, log_decay, 0.0)
            query, key, value = (jnp.where(real_BT1[..., None], x, 0).astype(dtype) for x in (query, key, value))
        if documents is not None:
            log_decay = jnp.where(documents.position_BT[..., None] == 0, FORGETS, log_decay)
        past = empty_recurrent_cache(spec, batch, dtype) if cache is None else cache
        grouped = (batch, length, spec.num_key_heads, -1)
        attended, state_BMGHZ = gated_delta_rule(
            unit(jax.nn.silu(causal_convolution(query, self.conv_query[...], past.query_BSMH, documents)))
            / math.sqrt(spec.key_head_dim),
            unit(jax.nn.silu(causal_convolution(key, self.conv_key[...], past.key_BSMH, documents))),
            jax.nn.silu(causal_convolution(value, self.conv_value[...], past.value_BSNZ, documents)).reshape(
                *grouped, spec.value_head_dim
            ),
            beta.reshape(grouped),
            log_decay.reshape(grouped),
            past.state_BMGHZ,
        )
        if cache is not None:
            cache = cache.extend(state_BMGHZ, query, key, value)
        normed = (self.output_norm(attended.reshape(value.shape)) * jax.nn.silu(gate)).astype(dtype)
        return Attended(projection.einsum("BTNZ,NZD->BTD", normed, self.w_output[...].astype(dtype)), cache, None, None)


def gated_delta_rule(
    query_BTMH: jax.Array,
    key_BTMH: jax.Array,
    value_BTMGZ: jax.Array,
    beta_BTMG: jax.Array,
    log_decay_BTMG: jax.Array,
    state_BMGHZ: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.delta_attention.gated_delta_rule_in_chunks; takes a state, and returns the last one.

    All float32. One token is a chunk of one, which is the recurrence.
    """
    batch, length = key_BTMH.shape[:2]
    chunk = min(chunk, length)
    query_BMTH, key_BMTH, value_BMGTZ = (
        in_chunks(x, chunk).swapaxes(-1, -2) for x in (query_BTMH, key_BTMH, value_BTMGZ)
    )
    beta_BMGT, log_decay_BMGT = in_chunks(beta_BTMG, chunk), in_chunks(log_decay_BTMG, chunk)
    decay_BMGTS, decay_BMGT1 = decays(log_decay_BMGT)
    overlap_BMTS = jnp.einsum("...MTH,...MSH->...MTS", key_BMTH, key_BMTH)
    score_BMTS = jnp.einsum("...MTH,...MSH->...MTS", query_BMTH, key_BMTH)
    lower_BMGTS = jnp.tril(beta_BMGT[..., None] * decay_BMGTS * overlap_BMTS[..., None, :, :], -1)
    inverse_BMGTS = _inverse_of_one_plus(lower_BMGTS)
    score_BMGTS = decay_BMGTS * score_BMTS[..., None, :, :]

    def one_chunk(state_BMGHZ: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query_BMTH, key_BMTH, value_BMGTZ, beta_BMGT, decay_BMGTS, decay_BMGT1, inverse_BMGTS, score_BMGTS = parts
        known_BMGTZ = decay_BMGT1 * jnp.einsum("BMTH,BMGHZ->BMGTZ", key_BMTH, state_BMGHZ)
        wanted_BMGTZ = beta_BMGT[..., None] * (value_BMGTZ - known_BMGTZ)
        change_BMGTZ = jnp.einsum("BMGTS,BMGSZ->BMGTZ", inverse_BMGTS, wanted_BMGTZ)
        read_BMGTZ = decay_BMGT1 * jnp.einsum("BMTH,BMGHZ->BMGTZ", query_BMTH, state_BMGHZ)
        read_BMGTZ = read_BMGTZ + jnp.einsum("BMGTS,BMGSZ->BMGTZ", score_BMGTS, change_BMGTZ)
        decayed_change_BMGTZ = decay_BMGTS[..., -1, :, None] * change_BMGTZ
        state_BMGHZ = decay_BMGT1[..., -1:, :] * state_BMGHZ
        state_BMGHZ = state_BMGHZ + jnp.einsum("BMTH,BMGTZ->BMGHZ", key_BMTH, decayed_change_BMGTZ)
        return state_BMGHZ, read_BMGTZ

    parts = (query_BMTH, key_BMTH, value_BMGTZ, beta_BMGT, decay_BMGTS, decay_BMGT1, inverse_BMGTS, score_BMGTS)
    state_BMGHZ, read = lax.scan(one_chunk, state_BMGHZ, parts)
    read = jnp.moveaxis(read, (0, -2), (1, 2))
    return read.reshape(batch, -1, *value_BTMGZ.shape[2:])[:, :length], state_BMGHZ


def unit(x: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.delta_attention.unit."""
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


@jax.custom_vjp
def _inverse_of_one_plus(lower: jax.Array) -> jax.Array:
    """Return `(1 + lower)^-1` of strictly lower triangular matrices [..., T, T], exact, from matrix products alone.

    Pairs of diagonal blocks with known inverses A' and B' are merged: [[A, 0], [C, B]] has the inverse
    [[A', 0], [-B' C A', B']]. Blocks of size one are their own inverse.
    """
    position_T = jnp.arange(lower.shape[-1])

    def joining(size: int) -> jax.Array:
        block_T = position_T // size
        joins_TS = (block_T[:, None] > block_T[None, :]) & (block_T[:, None] // 2 == block_T[None, :] // 2)
        return jnp.where(joins_TS, lower, 0.0)

    inverse, size = jnp.eye(lower.shape[-1]) - joining(1), 2
    while size < lower.shape[-1]:
        inverse = inverse - inverse @ joining(size) @ inverse
        size *= 2
    return inverse


def _inverse_and_itself(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = _inverse_of_one_plus(lower)
    return inverse, inverse


def _gradient_of_inverse(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    """Return the gradient by two products, instead of a gradient through each step."""
    transposed = inverse.swapaxes(-1, -2)
    return (-(transposed @ cotangent @ transposed),)


_inverse_of_one_plus.defvjp(_inverse_and_itself, _gradient_of_inverse)
