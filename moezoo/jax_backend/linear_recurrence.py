"""Recurrent states that decay, and to which each token adds. Spec: moezoo.core.reference.linear_recurrence."""

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 64
"""Chunk length in tokens."""


def linear_recurrence(
    query_BTMH: jax.Array,
    key_BTMH: jax.Array,
    value_BTMGZ: jax.Array,
    log_decay_BTMG: jax.Array,
    state_BMGHZ: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.linear_recurrence.linear_recurrence_in_chunks; takes a state, and returns the last.

    All float32. One token is a chunk of one, which is the recurrence.
    """
    batch, length = key_BTMH.shape[:2]
    chunk = min(chunk, length)
    query_BMTH, key_BMTH, value_BMGTZ = (
        in_chunks(x, chunk).swapaxes(-1, -2) for x in (query_BTMH, key_BTMH, value_BTMGZ)
    )
    decay_BMGTS, decay_BMGT1 = decays(in_chunks(log_decay_BTMG, chunk))
    score_BMTS = jnp.einsum("...MTH,...MSH->...MTS", query_BMTH, key_BMTH)
    score_BMGTS = decay_BMGTS * score_BMTS[..., None, :, :]
    read_BMGTZ = jnp.einsum("...MGTS,...MGSZ->...MGTZ", score_BMGTS, value_BMGTZ)
    decayed_BMGTZ = decay_BMGTS[..., -1, :, None] * value_BMGTZ
    added_BMGHZ = jnp.einsum("...MTH,...MGTZ->...MGHZ", key_BMTH, decayed_BMGTZ)

    def one_chunk(state_BMGHZ: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        decay_BMG11, added_BMGHZ = parts
        return decay_BMG11 * state_BMGHZ + added_BMGHZ, state_BMGHZ

    state_BMGHZ, states = lax.scan(one_chunk, state_BMGHZ, (decay_BMGT1[..., -1:, :], added_BMGHZ))

    known_BMGTZ = jnp.einsum("...MTH,...MGHZ->...MGTZ", query_BMTH, states)
    read = jnp.moveaxis(read_BMGTZ + decay_BMGT1 * known_BMGTZ, (0, -2), (1, 2))
    return read.reshape(batch, -1, *value_BTMGZ.shape[2:])[:, :length], state_BMGHZ


def in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, M, ...] -> [chunks, B, M, ..., T of a chunk], padded with zeros: tokens that change no state."""
    batch, length = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), (1, 2), (0, x.ndim))


def decays(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.linear_recurrence.decays."""
    position_T = jnp.arange(log_decay.shape[-1])
    before_TS = position_T[:, None] > position_T[None, :]
    # Trap: a difference of two sums from the start of the chunk would cancel the digits of a small sum.
    between = jnp.cumsum(jnp.where(before_TS, log_decay[..., None], 0.0), axis=-2)
    decay = jnp.where(before_TS.T, 0.0, jnp.exp(between))
    return decay, jnp.exp(jnp.cumsum(log_decay, axis=-1))[..., None]
