"""Recurrent states that decay, and to which each token adds: the common part of linear attention and Mamba-2."""

import autograd.numpy as np

from moezoo.core.reference import Array

FORGETS = -1e30
"""Logarithm of a decay to exactly 0. Minus infinity would be NaN where a sum multiplies it by 0."""


def linear_recurrence(query_BTMH: Array, key_BTMH: Array, value_BTMGZ: Array, log_decay_BTMG: Array) -> Array:
    """Decay, extend and read each head's state S, an H x Z matrix, token by token, in float32.

        S_t   = exp(log_decay_t) S_{t-1} + k_t v_t^T        S_{-1} = 0
        out_t = S_t^T q_t

    Args:
        query_BTMH, key_BTMH: M heads, which say where in the state a token reads and writes.
        value_BTMGZ, log_decay_BTMG: N = M * G heads of value width Z, G per key head; log_decay <= 0. A token with a
            value of 0 and log_decay 0 does not change the state; one with log_decay FORGETS begins with a state of 0.

    Returns:
        [B, T, M, G, Z].

    Source: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 16 to 20; with decay: Dao and Gu 2024, arXiv 2405.21060,
    eq. 2, where k is B, q is C, v is the input times its step, and S is the transpose.
    """
    batch, length, kv_heads, head_dim = key_BTMH.shape
    state_BMGHZ = np.zeros((batch, kv_heads, value_BTMGZ.shape[3], head_dim, value_BTMGZ.shape[4]))
    out = []
    for t in range(length):
        state_BMGHZ = np.exp(log_decay_BTMG[:, t])[..., None, None] * state_BMGHZ
        state_BMGHZ = state_BMGHZ + np.einsum("BMH,BMGZ->BMGHZ", key_BTMH[:, t], value_BTMGZ[:, t])
        out.append(np.einsum("BMGHZ,BMH->BMGZ", state_BMGHZ, query_BTMH[:, t]))
    return np.stack(out, axis=1)


def linear_recurrence_in_chunks(
    query_BTMH: Array, key_BTMH: Array, value_BTMGZ: Array, log_decay_BTMG: Array, chunk: int
) -> Array:
    """`linear_recurrence` as matrix products over `chunk` tokens, which backends compute.

    In a chunk that starts from state S, with decay(t, s) = exp(sum of log_decay over s < . <= t), and decay(t) that
    from the start of the chunk:

        out_t = decay(t) S^T q_t + sum over s <= t of decay(t, s) (q_t . k_s) v_s
        S'    = decay(end) S + sum over s of decay(end, s) k_s v_s^T

    Only S passes from chunk to chunk; the sums do not depend on it, and are computed for all chunks at once.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 6 (block decomposition).
    """
    batch, length, kv_heads, head_dim = key_BTMH.shape
    group, value_dim = value_BTMGZ.shape[3:]
    state_BMGHZ = np.zeros((batch, kv_heads, group, head_dim, value_dim))
    out = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        query_BMTH, key_BMTH = (np.transpose(x[:, part], (0, 2, 1, 3)) for x in (query_BTMH, key_BTMH))
        value_BMGTZ = np.transpose(value_BTMGZ[:, part], (0, 2, 3, 1, 4))
        decay_BMGTS, decay_BMGT1 = decays(np.transpose(log_decay_BTMG[:, part], (0, 2, 3, 1)))
        score_BMTS = np.einsum("...MTH,...MSH->...MTS", query_BMTH, key_BMTH)
        score_BMGTS = decay_BMGTS * score_BMTS[:, :, None]
        read_BMGTZ = np.einsum("...MGTS,...MGSZ->...MGTZ", score_BMGTS, value_BMGTZ)
        known_BMGTZ = np.einsum("...MTH,...MGHZ->...MGTZ", query_BMTH, state_BMGHZ)
        read_BMGTZ = read_BMGTZ + decay_BMGT1 * known_BMGTZ
        decayed_BMGTZ = decay_BMGTS[..., -1, :, None] * value_BMGTZ
        added_BMGHZ = np.einsum("...MTH,...MGTZ->...MGHZ", key_BMTH, decayed_BMGTZ)
        state_BMGHZ = decay_BMGT1[..., -1:, :] * state_BMGHZ + added_BMGHZ
        out.append(np.transpose(read_BMGTZ, (0, 3, 1, 2, 4)))
    return np.concatenate(out, axis=1)


def decays(log_decay: Array) -> tuple[Array, Array]:
    """Return the decays between the tokens of a chunk, from s to t [..., T, S], and from its start to t [..., T, 1].

    The former are 0 for s > t and 1 for s = t. `log_decay`: [..., T].
    """
    position_T = np.arange(log_decay.shape[-1])
    before_TS = position_T[:, None] > position_T[None, :]
    # Trap: a difference of two sums from the start of the chunk would cancel the digits of a small sum.
    between = np.cumsum(np.where(before_TS, log_decay[..., None], 0.0), axis=-2)
    return np.where(before_TS.T, 0.0, np.exp(between)), np.exp(np.cumsum(log_decay, axis=-1))[..., None]
