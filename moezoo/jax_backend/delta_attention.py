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
        if spec.gate_rank is not None:
            self.w_gate_down = weights.parameter("w_gate_down")
        self.w_gate = weights.parameter("w_gate")
        self.w_beta = weights.parameter("w_beta")
        if spec.decay_rank is not None:
            self.w_decay_down = weights.parameter("w_decay_down")
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
        beta = jax.nn.sigmoid(
            projection.einsum("BTD,DN->BTN", x_BTD, self.w_beta[...].astype(dtype)).astype(jnp.float32)
        )
        log_decay = self._log_decay(x_BTD)
        batch, length = x_BTD.shape[:2]
        if first_B is not None:  # padding keeps a state of zeros, and is zero as an input of the convolutions
            real_BT1 = positions(length, 0 if cache is None else cache.length, first_B)[..., None] >= 0
            beta, log_decay = jnp.where(real_BT1, beta, 0.0), jnp.where(real_BT1[..., None], log_decay, 0.0)
            query, key, value = (jnp.where(real_BT1[..., None], x, 0).astype(dtype) for x in (query, key, value))
        if documents is not None:
            log_decay = jnp.where(documents.position_BT[..., None, None] == 0, FORGETS, log_decay)
        past = empty_recurrent_cache(spec, batch, dtype) if cache is None else cache
        grouped = (batch, length, spec.num_key_heads, spec.num_value_heads // spec.num_key_heads)
        attended, state_BMGHZ = gated_delta_rule(
            unit(jax.nn.silu(causal_convolution(query, self.conv_query[...], past.query_BSMH, documents)))
            / math.sqrt(spec.key_head_dim),
            unit(jax.nn.silu(causal_convolution(key, self.conv_key[...], past.key_BSMH, documents))),
            jax.nn.silu(causal_convolution(value, self.conv_value[...], past.value_BSNZ, documents)).reshape(
                *grouped, spec.value_head_dim
            ),
            beta.reshape(grouped),
            log_decay.reshape(*grouped, -1),
            past.state_BMGHZ,
        )
        if cache is not None:
            cache = cache.extend(state_BMGHZ, query, key, value)
        normed = (self.output_norm(attended.reshape(value.shape)) * self._gate(x_BTD)).astype(dtype)
        return Attended(projection.einsum("BTNZ,NZD->BTD", normed, self.w_output[...].astype(dtype)), cache, None, None)

    def _gate(self, x_BTD: jax.Array) -> jax.Array:
        """Return the gate of the output [B, T, N, Z], in float32."""
        spec, dtype = self.spec, x_BTD.dtype
        if spec.gate_rank is not None:
            x_BTD = projection.einsum("BTD,DF->BTF", x_BTD, self.w_gate_down[...].astype(dtype))
        gate = projection.einsum("BTF,FNZ->BTNZ", x_BTD, self.w_gate[...].astype(dtype)).astype(jnp.float32)
        return jax.nn.silu(gate) if spec.gate == "silu" else jax.nn.sigmoid(gate)

    def _log_decay(self, x_BTD: jax.Array) -> jax.Array:
        """Return the logarithms of the decays [B, T, N, H], or [B, T, N, 1] if they are per head, in float32."""
        spec, dtype = self.spec, x_BTD.dtype
        if spec.decay_rank is not None:
            x_BTD = projection.einsum("BTD,DF->BTF", x_BTD, self.w_decay_down[...].astype(dtype))
        bias = self.decay_bias[...].astype(jnp.float32)
        if spec.decay == "channel":
            step = projection.einsum("BTF,FNH->BTNH", x_BTD, self.w_decay[...].astype(dtype)).astype(jnp.float32) + bias
        else:
            step = projection.einsum("BTF,FN->BTN", x_BTD, self.w_decay[...].astype(dtype)).astype(jnp.float32) + bias
            step = step[..., None]
        rate_N1 = jnp.exp(self.log_decay_rate[...].astype(jnp.float32))[:, None]
        if spec.log_decay_floor is None:
            return -rate_N1 * jax.nn.softplus(step)
        return spec.log_decay_floor * jax.nn.sigmoid(rate_N1 * step)


def gated_delta_rule(
    query_BTMH: jax.Array,
    key_BTMH: jax.Array,
    value_BTMGZ: jax.Array,
    beta_BTMG: jax.Array,
    log_decay_BTMGH: jax.Array,
    state_BMGHZ: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.delta_attention.gated_delta_rule_in_chunks; takes a state, and returns the last one.

    All float32. One token is a chunk of one, which is the recurrence. `log_decay_BTMGH` may have 1 in place of H.
    """
    batch, length = key_BTMH.shape[:2]
    chunk = min(chunk, 1 << (length - 1).bit_length())
    query_BMTH, key_BMTH, value_BMGTZ, log_decay_BMGTH = (
        in_chunks(x, chunk).swapaxes(-1, -2) for x in (query_BTMH, key_BTMH, value_BTMGZ, log_decay_BTMGH)
    )
    beta_BMGT = in_chunks(beta_BTMG, chunk)
    overlap_BMGTS = _decayed_products(key_BMTH, key_BMTH, log_decay_BMGTH)
    score_BMGTS = _decayed_products(query_BMTH, key_BMTH, log_decay_BMGTH)
    inverse_BMGTS = _inverse_of_one_plus(jnp.tril(beta_BMGT[..., None] * overlap_BMGTS, -1))
    decay_BMGTH, to_end_BMGTH = jnp.exp(jnp.cumsum(log_decay_BMGTH, axis=-2)), jnp.exp(_later(log_decay_BMGTH))

    def one_chunk(state_BMGHZ: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query_BMTH, key_BMTH, value_BMGTZ, beta_BMGT, decay_BMGTH, to_end_BMGTH, inverse_BMGTS, score_BMGTS = parts
        wanted_BMGTZ = beta_BMGT[..., None] * (value_BMGTZ - _read(key_BMTH, decay_BMGTH, state_BMGHZ))
        change_BMGTZ = jnp.einsum("BMGTS,BMGSZ->BMGTZ", inverse_BMGTS, wanted_BMGTZ)
        read_BMGTZ = _read(query_BMTH, decay_BMGTH, state_BMGHZ)
        read_BMGTZ = read_BMGTZ + jnp.einsum("BMGTS,BMGSZ->BMGTZ", score_BMGTS, change_BMGTZ)
        state_BMGHZ = decay_BMGTH[..., -1, :, None] * state_BMGHZ
        return state_BMGHZ + _written(key_BMTH, to_end_BMGTH, change_BMGTZ), read_BMGTZ

    parts = (query_BMTH, key_BMTH, value_BMGTZ, beta_BMGT, decay_BMGTH, to_end_BMGTH, inverse_BMGTS, score_BMGTS)
    state_BMGHZ, read = lax.scan(one_chunk, state_BMGHZ, parts)
    read = jnp.moveaxis(read, (0, -2), (1, 2))
    return read.reshape(batch, -1, *value_BTMGZ.shape[2:])[:, :length], state_BMGHZ


def _read(x_BMTH: jax.Array, decay_BMGTH: jax.Array, state_BMGHZ: jax.Array) -> jax.Array:
    """Return what the decayed state holds for queries or keys [B, M, G, T, Z]. A decay per head needs no copy of x."""
    if decay_BMGTH.shape[-1] == 1:
        return decay_BMGTH * jnp.einsum("BMTH,BMGHZ->BMGTZ", x_BMTH, state_BMGHZ)
    return jnp.einsum("BMGTH,BMGHZ->BMGTZ", decay_BMGTH * x_BMTH[:, :, None], state_BMGHZ)


def _written(key_BMTH: jax.Array, decay_BMGTH: jax.Array, change_BMGTZ: jax.Array) -> jax.Array:
    """Return what the tokens add to the state at the end of the chunk [B, M, G, H, Z]."""
    if decay_BMGTH.shape[-1] == 1:
        return jnp.einsum("BMTH,BMGTZ->BMGHZ", key_BMTH, decay_BMGTH * change_BMGTZ)
    return jnp.einsum("BMGTH,BMGTZ->BMGHZ", decay_BMGTH * key_BMTH[:, :, None], change_BMGTZ)


def _decayed_products(left_BMTH: jax.Array, right_BMTH: jax.Array, log_decay_BMGTH: jax.Array) -> jax.Array:
    """Return `sum over h of left_th right_sh decay_h(t, s)` for s <= t, and 0 for s > t: [..., B, M, G, T, S].

    All [..., T, H], with T a power of two; `log_decay_BMGTH` may have 1 in place of H.

    Pairs of blocks of tokens are merged, from single tokens up. The decay between tokens of two neighboring blocks is
    the product of that to the end of the first and that from the start of the second: neither overflows, and neither
    is a difference of sums, which would lose digits.
    """
    *batch, length, head_dim = log_decay_BMGTH.shape
    if head_dim == 1:
        product_BMTS = jnp.einsum("...MTH,...MSH->...MTS", left_BMTH, right_BMTH)
        return decays(log_decay_BMGTH[..., 0])[0] * product_BMTS[..., None, :, :]
    # Trap: XLA for CPUs crashes on arrays of more than 8 axes. The halves have as many; to merge chunks, sequences and
    # heads would make devices of a mesh that share these compute all of them.
    left, right, log_decay = (
        jnp.broadcast_to(x, (*batch, length, head_dim))
        for x in (left_BMTH[..., None, :, :], right_BMTH[..., None, :, :], log_decay_BMGTH)
    )
    product = jnp.sum(left * right, axis=-1)[..., None, None]
    size = 1
    while size < length:
        (_, left_2), (right_1, _), (log_decay_1, log_decay_2) = (_halves(x, size) for x in (left, right, log_decay))
        left_2 = left_2 * jnp.exp(jnp.cumsum(log_decay_2, axis=-2))
        between = left_2 @ (right_1 * jnp.exp(_later(log_decay_1))).swapaxes(-1, -2)
        first, second = product[..., ::2, :, :], product[..., 1::2, :, :]
        above = jnp.concatenate([first, jnp.zeros_like(between)], axis=-1)
        product = jnp.concatenate([above, jnp.concatenate([between, second], axis=-1)], axis=-2)
        size *= 2
    return product[..., 0, :, :]


def _halves(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Return the first and the second block of `size` tokens of each pair: [..., T, H] -> two [..., pairs, size, H]."""
    pairs = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _later(log_decay: jax.Array) -> jax.Array:
    """Return the sum over later tokens, of [..., T, H]."""
    later = jnp.pad(log_decay[..., 1:, :], [(0, 0)] * (log_decay.ndim - 2) + [(0, 1), (0, 0)])
    return lax.cumsum(later, axis=later.ndim - 2, reverse=True)


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
