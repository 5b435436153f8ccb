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
    query_BTMH: Array, key_BTMH: Array, value_BTMGZ: Array, beta_BTMG: Array, log_decay_BTMGH: Array
) -> Array:
    """Gated delta rule, token by token: decay, correct and read each head's state S, an H x Z matrix, in float32.

        S_t = A_t S_{t-1} + k_t (beta_t (v_t - (A_t S_{t-1})^T k_t))^T        A_t = diag(exp(log_decay_t))
        out_t = S_t^T q_t                                                     S_{-1} = 0

    S maps keys to values. The value that the decayed state holds for the key moves towards the new value by beta. Each
    feature of the key has its own decay (Kimi delta attention), or all have the same.

    Args:
        query_BTMH, key_BTMH: M heads; keys of norm one (less where their norm before scaling is close to epsilon).
        value_BTMGZ, beta_BTMG, log_decay_BTMGH: N = M * G heads of value width Z, G per key head. 0 <= beta <= 1,
            log_decay <= 0, with one number for all H features or one for each. A token with beta 0 and log_decay 0 does
            not change the state; one with log_decay FORGETS begins with a state of zeros.

    Returns:
        [B, T, M, G, Z].

    Source: Yang et al. 2024, arXiv 2412.06464, section 3.1; per feature: Kimi Team 2025, arXiv 2510.26692, eq. 1.
    Differs: our state is the transpose, and the value width has the letter Z (the alphabet's latent width).
    """
    batch, length, kv_heads, head_dim = key_BTMH.shape
    state_BMGHZ = np.zeros((batch, kv_heads, value_BTMGZ.shape[3], head_dim, value_BTMGZ.shape[4]))
    out = []
    for t in range(length):
        state_BMGHZ = np.exp(log_decay_BTMGH[:, t])[..., None] * state_BMGHZ
        known_BMGZ = np.einsum("BMGHZ,BMH->BMGZ", state_BMGHZ, key_BTMH[:, t])
        change_BMGZ = beta_BTMG[:, t][..., None] * (value_BTMGZ[:, t] - known_BMGZ)
        state_BMGHZ = state_BMGHZ + np.einsum("BMH,BMGZ->BMGHZ", key_BTMH[:, t], change_BMGZ)
        out.append(np.einsum("BMGHZ,BMH->BMGZ", state_BMGHZ, query_BTMH[:, t]))
    return np.stack(out, axis=1)


def gated_delta_rule_in_chunks(
    query_BTMH: Array, key_BTMH: Array, value_BTMGZ: Array, beta_BTMG: Array, log_decay_BTMGH: Array, chunk: int
) -> Array:
    """Gated delta rule in chunks: `gated_delta_rule` as matrix products over `chunk` tokens, which backends compute.

    In a chunk that starts from state S, with decay(t, s) = exp(sum of log_decay over s < . <= t), and decay(t) that
    from the start of the chunk, both of each feature h, the change that a token makes depends on those of earlier ones:

        change_t = beta_t (v_t - S^T (decay(t) k_t) - sum over s < t of (sum_h k_th decay_h(t, s) k_sh) change_s)
        out_t    = S^T (decay(t) q_t) + sum over s <= t of (sum_h q_th decay_h(t, s) k_sh) change_s
        S'       = decay(end) S + sum over s of (decay(end, s) k_s) change_s^T

    The first line is a triangular system, (1 + lower) change = beta (v - S^T (decay k)); its inverse does not depend on
    S, so the backends compute it for all chunks at once.

    Source: Yang et al. 2024, arXiv 2412.06464, section 3.3, and arXiv 2406.06484, section 3 (UT transform); per
    feature: Kimi Team 2025, arXiv 2510.26692, section 3.
    Differs: the state is on the right-hand side, in place of the papers' W and U, which saves a product.
    """
    batch, length, kv_heads, head_dim = key_BTMH.shape
    group, value_dim = value_BTMGZ.shape[3:]
    state_BMGHZ = np.zeros((batch, kv_heads, group, head_dim, value_dim))
    out = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        query_BMTH, key_BMTH = (np.transpose(x[:, part], (0, 2, 1, 3)) for x in (query_BTMH, key_BTMH))
        value_BMGTZ = np.transpose(value_BTMGZ[:, part], (0, 2, 3, 1, 4))
        beta_BMGT = np.transpose(beta_BTMG[:, part], (0, 2, 3, 1))
        log_decay_BMGTH = np.transpose(log_decay_BTMGH[:, part], (0, 2, 3, 1, 4))
        overlap_BMGTS = _decayed_products(key_BMTH, key_BMTH, log_decay_BMGTH)
        score_BMGTS = _decayed_products(query_BMTH, key_BMTH, log_decay_BMGTH)
        lower_BMGTS = np.tril(beta_BMGT[..., None] * overlap_BMGTS, -1)
        inverse_BMGTS = np.linalg.inv(np.eye(key_BMTH.shape[2]) + lower_BMGTS)
        decay_BMGTH = np.exp(np.cumsum(log_decay_BMGTH, axis=-2))
        later_BMGTH = np.pad(log_decay_BMGTH[:, :, :, 1:], ((0, 0),) * 3 + ((0, 1), (0, 0)))
        to_end_BMGTH = np.exp(np.cumsum(later_BMGTH[:, :, :, ::-1], axis=-2)[:, :, :, ::-1])

        wanted_BMGTZ = beta_BMGT[..., None] * (value_BMGTZ - _read(key_BMTH, decay_BMGTH, state_BMGHZ))
        change_BMGTZ = np.einsum("BMGTS,BMGSZ->BMGTZ", inverse_BMGTS, wanted_BMGTZ)
        read_BMGTZ = _read(query_BMTH, decay_BMGTH, state_BMGHZ)
        read_BMGTZ = read_BMGTZ + np.einsum("BMGTS,BMGSZ->BMGTZ", score_BMGTS, change_BMGTZ)
        state_BMGHZ = decay_BMGTH[..., -1, :, None] * state_BMGHZ
        state_BMGHZ = state_BMGHZ + _written(key_BMTH, to_end_BMGTH, change_BMGTZ)
        out.append(np.transpose(read_BMGTZ, (0, 3, 1, 2, 4)))
    return np.concatenate(out, axis=1)


def _read(x_BMTH: Array, decay_BMGTH: Array, state_BMGHZ: Array) -> Array:
    """Return what the decayed state holds for queries or keys [B, M, G, T, Z]. A decay per head needs no copy of x."""
    if decay_BMGTH.shape[-1] == 1:
        return decay_BMGTH * np.einsum("BMTH,BMGHZ->BMGTZ", x_BMTH, state_BMGHZ)
    return np.einsum("BMGTH,BMGHZ->BMGTZ", decay_BMGTH * x_BMTH[:, :, None], state_BMGHZ)


def _written(key_BMTH: Array, decay_BMGTH: Array, change_BMGTZ: Array) -> Array:
    """Return what the tokens add to the state at the end of the chunk [B, M, G, H, Z]."""
    if decay_BMGTH.shape[-1] == 1:
        return np.einsum("BMTH,BMGTZ->BMGHZ", key_BMTH, decay_BMGTH * change_BMGTZ)
    return np.einsum("BMGTH,BMGTZ->BMGHZ", decay_BMGTH * key_BMTH[:, :, None], change_BMGTZ)


def _decayed_products(left_BMTH: Array, right_BMTH: Array, log_decay_BMGTH: Array) -> Array:
    """Return `sum over h of left_th right_sh decay_h(t, s)` for s <= t, and 0 for s > t: [B, M, G, T, S]."""
    decay_BMGHTS, _ = decays(np.swapaxes(log_decay_BMGTH, 3, 4))
    if decay_BMGHTS.shape[3] == 1:
        product_BMTS = np.einsum("...MTH,...MSH->...MTS", left_BMTH, right_BMTH)
        return decay_BMGHTS[:, :, :, 0] * product_BMTS[:, :, None]
    return np.einsum("BMTH,BMSH,BMGHTS->BMGTS", left_BMTH, right_BMTH, decay_BMGHTS)


def unit(x: Array) -> Array:
    """L2-normalize over the last axis: `x / sqrt(sum(x^2) + 1e-6)`."""
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def gated_delta_attention(
    spec: GatedDeltaAttentionSpec, parameters: Parameters, x_BTD: Array, *, documents: Documents | None = None
) -> Attended:
    """Gated DeltaNet layer: [B, T, D] -> [B, T, D]. Decay and convolution order the tokens; no position encoding.

    Order: project; silu of convolved queries, keys and values; L2-normalize queries and keys, divide queries by
    sqrt(H); the gated delta rule; normalize each head over its Z features; multiply by silu or sigmoid of a gate;
    output projection.

        beta      = sigmoid(x w_beta)                                                       how much a token writes
        log_decay = -exp(log_decay_rate) * softplus(x w_decay + decay_bias)                 how much it forgets
                 or  floor * sigmoid(exp(log_decay_rate) * (x w_decay + decay_bias))        with log_decay_floor

    With `decay_rank` and `gate_rank`, x is first multiplied by w_decay_down and w_gate_down. The first token of each of
    the `documents` of packed sequences forgets everything.

    Source: Yang et al. 2024, arXiv 2412.06464, fig. 1; decay: Dao and Gu 2024, arXiv 2405.21060 (Mamba-2), where
    `log_decay_rate` is A_log and `decay_bias` is dt_bias; heads shared and gated as in Qwen3-Next; decay per channel
    and of low rank: Kimi Team 2025, arXiv 2510.26692; floor: Ling 3.0 (transformers, `bailing_hybrid`).
    """
    query = adapter.einsum("BTD,DMH->BTMH", x_BTD, parameters["w_query"])
    key = adapter.einsum("BTD,DMH->BTMH", x_BTD, parameters["w_key"])
    value = adapter.einsum("BTD,DNZ->BTNZ", x_BTD, parameters["w_value"])
    gate = adapter.einsum("BTF,FNZ->BTNZ", _projected(parameters, "w_gate_down", x_BTD), parameters["w_gate"])
    beta = sigmoid(adapter.einsum("BTD,DN->BTN", x_BTD, parameters["w_beta"]))
    log_decay = _log_decay(spec, parameters, x_BTD)
    if documents is not None:
        log_decay = np.where(documents.position_BT[..., None, None] == 0, FORGETS, log_decay)
    query = unit(silu(causal_convolution(query, parameters["conv_query"], documents))) / np.sqrt(spec.key_head_dim)
    key = unit(silu(causal_convolution(key, parameters["conv_key"], documents)))
    value = silu(causal_convolution(value, parameters["conv_value"], documents))
    grouped = (*x_BTD.shape[:2], spec.num_key_heads, spec.num_value_heads // spec.num_key_heads)
    attended = gated_delta_rule(
        query, key, value.reshape(*grouped, -1), beta.reshape(grouped), log_decay.reshape(*grouped, -1)
    )
    normed = normalize(spec.norm, inside(parameters, "output_norm"), attended.reshape(value.shape))
    normed = normed * (silu(gate) if spec.gate == "silu" else sigmoid(gate))
    return Attended(adapter.einsum("BTNZ,NZD->BTD", normed, parameters["w_output"]), None, None)


def _projected(parameters: Parameters, down: str, x_BTD: Array) -> Array:
    return adapter.einsum("BTD,DF->BTF", x_BTD, parameters[down]) if down in parameters else x_BTD


def _log_decay(spec: GatedDeltaAttentionSpec, parameters: Parameters, x_BTD: Array) -> Array:
    """Return the logarithms of the decays [B, T, N, H], or [B, T, N, 1] if they are per head."""
    source_BTF = _projected(parameters, "w_decay_down", x_BTD)
    if spec.decay == "channel":
        step = adapter.einsum("BTF,FNH->BTNH", source_BTF, parameters["w_decay"]) + parameters["decay_bias"]
    else:
        step = adapter.einsum("BTF,FN->BTN", source_BTF, parameters["w_decay"]) + parameters["decay_bias"]
        step = step[..., None]
    rate_N1 = np.exp(parameters["log_decay_rate"])[:, None]
    if spec.log_decay_floor is None:
        return -rate_N1 * np.logaddexp(0.0, step)
    return spec.log_decay_floor * sigmoid(rate_N1 * step)
