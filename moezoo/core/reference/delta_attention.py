"""Linear attention with a recurrent state: the gated delta rule (Gated DeltaNet)."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.attention import Attended
from moezoo.core.reference.convolution import causal_convolution
from moezoo.core.reference.feed_forward import sigmoid, silu
from moezoo.core.reference.linear_recurrence import FORGETS, decays
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents
from moezoo.core.spec import GatedDeltaAttentionSpec


def gated_delta_rule(
    query_BTMH: Array, key_BTMH: Array, value_BTMGZ: Array, beta_BTMG: Array, log_decay_BTMG: Array
) -> Array:
    """Gated delta rule, token by token: decay, correct and read each head's state S, an H x Z matrix, in float32.

        S_t = a_t S_{t-1} + k_t (beta_t (v_t - (a_t S_{t-1})^T k_t))^T        a_t = exp(log_decay_t)
        out_t = S_t^T q_t                                                     S_{-1} = 0

    S maps keys to values. The value that the decayed state holds for the key moves towards the new value by beta.

    Args:
        query_BTMH, key_BTMH: M heads; keys of norm one (less where their norm before scaling is close to epsilon).
        value_BTMGZ, beta_BTMG, log_decay_BTMG: N = M * G heads of value width Z, G per key head. 0 <= beta <= 1,
            log_decay <= 0. A token with beta 0 and log_decay 0 does not change the state; one with log_decay FORGETS
            begins with a state of zeros.

    Returns:
        [B, T, M, G, Z].

    Source: Yang et al. 2024, arXiv 2412.06464, section 3.1.
    Differs: our state is the transpose, and the value width has the letter Z (the alphabet's latent width).
    """
    batch, length, kv_heads, head_dim = key_BTMH.shape
    state_BMGHZ = np.zeros((batch, kv_heads, value_BTMGZ.shape[3], head_dim, value_BTMGZ.shape[4]))
    out = []
    for t in range(length):
        state_BMGHZ = np.exp(log_decay_BTMG[:, t])[..., None, None] * state_BMGHZ
        known_BMGZ = np.einsum("BMGHZ,BMH->BMGZ", state_BMGHZ, key_BTMH[:, t])
        change_BMGZ = beta_BTMG[:, t][..., None] * (value_BTMGZ[:, t] - known_BMGZ)
        state_BMGHZ = state_BMGHZ + np.einsum("BMH,BMGZ->BMGHZ", key_BTMH[:, t], change_BMGZ)
        out.append(np.einsum("BMGHZ,BMH->BMGZ", state_BMGHZ, query_BTMH[:, t]))
    return np.stack(out, axis=1)


def gated_delta_rule_in_chunks(
    query_BTMH: Array, key_BTMH: Array, value_BTMGZ: Array, beta_BTMG: Array, log_decay_BTMG: Array, chunk: int
) -> Array:
    """Gated delta rule in chunks: `gated_delta_rule` as matrix products over `chunk` tokens, which backends compute.

    In a chunk that starts from state S, with decay(t, s) = exp(sum of log_decay over s < . <= t), and decay(t) that
    from the start of the chunk, the change that a token makes depends on those of earlier tokens:

        change_t = beta_t (v_t - decay(t) S^T k_t - sum over s < t of decay(t, s) (k_t . k_s) change_s)
        out_t    = decay(t) S^T q_t + sum over s <= t of decay(t, s) (q_t . k_s) change_s
        S'       = decay(end) S + sum over s of decay(end, s) k_s change_s^T

    The first line is a triangular system, (1 + lower) change = beta (v - decay S^T k); its inverse does not depend on
    S, so the backends compute it for all chunks at once.

    Source: Yang et al. 2024, arXiv 2412.06464, section 3.3, and arXiv 2406.06484, section 3 (UT transform).
    Differs: the state is on the right-hand side, in place of the paper's W and U, which saves a product.
    """
    batch, length, kv_heads, head_dim = key_BTMH.shape
    group, value_dim = value_BTMGZ.shape[3:]
    state_BMGHZ = np.zeros((batch, kv_heads, group, head_dim, value_dim))
    out = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        query_BMTH, key_BMTH = (np.transpose(x[:, part], (0, 2, 1, 3)) for x in (query_BTMH, key_BTMH))
        value_BMGTZ = np.transpose(value_BTMGZ[:, part], (0, 2, 3, 1, 4))
        beta_BMGT, log_decay_BMGT = (np.transpose(x[:, part], (0, 2, 3, 1)) for x in (beta_BTMG, log_decay_BTMG))
        decay_BMGTS, decay_BMGT1 = decays(log_decay_BMGT)
        overlap_BMTS = np.einsum("...MTH,...MSH->...MTS", key_BMTH, key_BMTH)
        score_BMTS = np.einsum("...MTH,...MSH->...MTS", query_BMTH, key_BMTH)
        lower_BMGTS = np.tril(beta_BMGT[..., None] * decay_BMGTS * overlap_BMTS[:, :, None], -1)
        inverse_BMGTS = np.linalg.inv(np.eye(key_BMTH.shape[2]) + lower_BMGTS)
        score_BMGTS = decay_BMGTS * score_BMTS[:, :, None]

        known_BMGTZ = decay_BMGT1 * np.einsum("BMTH,BMGHZ->BMGTZ", key_BMTH, state_BMGHZ)
        wanted_BMGTZ = beta_BMGT[..., None] * (value_BMGTZ - known_BMGTZ)
        change_BMGTZ = np.einsum("BMGTS,BMGSZ->BMGTZ", inverse_BMGTS, wanted_BMGTZ)
        read_BMGTZ = decay_BMGT1 * np.einsum("BMTH,BMGHZ->BMGTZ", query_BMTH, state_BMGHZ)
        read_BMGTZ = read_BMGTZ + np.einsum("BMGTS,BMGSZ->BMGTZ", score_BMGTS, change_BMGTZ)
        decayed_change_BMGTZ = decay_BMGTS[..., -1, :, None] * change_BMGTZ
        state_BMGHZ = decay_BMGT1[..., -1:, :] * state_BMGHZ
        state_BMGHZ = state_BMGHZ + np.einsum("BMTH,BMGTZ->BMGHZ", key_BMTH, decayed_change_BMGTZ)
        out.append(np.transpose(read_BMGTZ, (0, 3, 1, 2, 4)))
    return np.concatenate(out, axis=1)


def unit(x: Array) -> Array:
    """L2-normalize over the last axis: `x / sqrt(sum(x^2) + 1e-6)`."""
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def gated_delta_attention(
    spec: GatedDeltaAttentionSpec, parameters: Parameters, x_BTD: Array, *, documents: Documents | None = None
) -> Attended:
    """Gated DeltaNet layer: [B, T, D] -> [B, T, D]. Decay and convolution order the tokens; no position encoding.

    Order: project; silu of convolved queries, keys and values; L2-normalize queries and keys, divide queries by
    sqrt(H); the gated delta rule; normalize each head over its Z features; multiply by silu of a gate; output
    projection.

        beta      = sigmoid(x w_beta)                                                       how much a token writes
        log_decay = -exp(log_decay_rate) * softplus(x w_decay + decay_bias)                 how much it forgets

    The first token of each of the `documents` of packed sequences forgets everything.

    Source: Yang et al. 2024, arXiv 2412.06464, fig. 1; decay: Dao and Gu 2024, arXiv 2405.21060 (Mamba-2), where
    `log_decay_rate` is A_log and `decay_bias` is dt_bias; heads shared and gated as in Qwen3-Next.
    """
    query = adapter.einsum("BTD,DMH->BTMH", x_BTD, parameters["w_query"])
    key = adapter.einsum("BTD,DMH->BTMH", x_BTD, parameters["w_key"])
    value = adapter.einsum("BTD,DNZ->BTNZ", x_BTD, parameters["w_value"])
    gate = adapter.einsum("BTD,DNZ->BTNZ", x_BTD, parameters["w_gate"])
    beta = sigmoid(adapter.einsum("BTD,DN->BTN", x_BTD, parameters["w_beta"]))
    step = np.logaddexp(0.0, adapter.einsum("BTD,DN->BTN", x_BTD, parameters["w_decay"]) + parameters["decay_bias"])
    log_decay = -np.exp(parameters["log_decay_rate"]) * step
    if documents is not None:
        log_decay = np.where(documents.position_BT[..., None] == 0, FORGETS, log_decay)
    query = unit(silu(causal_convolution(query, parameters["conv_query"], documents))) / np.sqrt(spec.key_head_dim)
    key = unit(silu(causal_convolution(key, parameters["conv_key"], documents)))
    value = silu(causal_convolution(value, parameters["conv_value"], documents))
    batch, length = x_BTD.shape[:2]
    grouped = (batch, length, spec.num_key_heads, -1)
    attended = gated_delta_rule(
        query, key, value.reshape(*grouped, spec.value_head_dim), beta.reshape(grouped), log_decay.reshape(grouped)
    )
    normed = normalize(spec.norm, inside(parameters, "output_norm"), attended.reshape(value.shape))
    return Attended(adapter.einsum("BTNZ,NZD->BTD", normed * silu(gate), parameters["w_output"]), None, None)
