"""Recurrent states that decay, and to which each token adds. Spec: moezoo.core.reference.linear_recurrence."""

import mlx.core as mx

from moezoo.mlx_backend.kernels.segments import in_segments

CHUNK = 64
"""Chunk length in tokens."""


@in_segments
def linear_recurrence(
    query_BTMH: mx.array,
    key_BTMH: mx.array,
    value_BTMGZ: mx.array,
    log_decay_BTMG: mx.array,
    state_BMGHZ: mx.array,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.linear_recurrence.linear_recurrence_in_chunks; takes a state, and returns the last.

    All float32. One token is a chunk of one, which is the recurrence.
    """
    batch, length = key_BTMH.shape[:2]
    chunk = min(chunk, length)
    query_BMTH, key_BMTH, value_BMGTZ = (
        in_chunks(x, chunk).swapaxes(-1, -2) for x in (query_BTMH, key_BTMH, value_BTMGZ)
    )
    decay_BMGTS, decay_BMGT1 = decays(in_chunks(log_decay_BTMG, chunk))
    score_BMTS = mx.einsum("...MTH,...MSH->...MTS", query_BMTH, key_BMTH)
    score_BMGTS = decay_BMGTS * score_BMTS[..., None, :, :]
    read_BMGTZ = mx.einsum("...MGTS,...MGSZ->...MGTZ", score_BMGTS, value_BMGTZ)
    decayed_BMGTZ = decay_BMGTS[..., -1, :, None] * value_BMGTZ
    added_BMGHZ = mx.einsum("...MTH,...MGTZ->...MGHZ", key_BMTH, decayed_BMGTZ)

    states = []
    for index in range(len(added_BMGHZ)):
        states.append(state_BMGHZ)
        state_BMGHZ = decay_BMGT1[index, ..., -1:, :] * state_BMGHZ + added_BMGHZ[index]

    known_BMGTZ = mx.einsum("...MTH,...MGHZ->...MGTZ", query_BMTH, mx.stack(states))
    read = (read_BMGTZ + decay_BMGT1 * known_BMGTZ).swapaxes(0, 1).moveaxis(-2, 2)
    return read.reshape(batch, -1, *value_BTMGZ.shape[2:])[:, :length], state_BMGHZ


def in_chunks(x: mx.array, chunk: int) -> mx.array:
    """[B, T, M, ...] -> [chunks, B, M, ..., T of a chunk], padded with zeros: tokens that change no state."""
    batch, length = x.shape[:2]
    x = mx.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, -1, chunk, *x.shape[2:]).swapaxes(0, 1).moveaxis(2, -1)


def decays(log_decay: mx.array) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.linear_recurrence.decays."""
    position_T = mx.arange(log_decay.shape[-1])
    before_TS = position_T[:, None] > position_T[None, :]
    # Trap: a difference of two sums from the start of the chunk would cancel the digits of a small sum.
    between = mx.cumsum(mx.where(before_TS, log_decay[..., None], 0.0), axis=-2)
    decay = mx.where(mx.swapaxes(before_TS, 0, 1), 0.0, mx.exp(between))
    return decay, mx.exp(mx.cumsum(log_decay, axis=-1))[..., None]
