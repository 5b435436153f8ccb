"""Mamba-1: a selective state-space layer with a decay for each number of its state."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.attention import Attended
from moezoo.core.reference.convolution import causal_convolution
from moezoo.core.reference.feed_forward import silu
from moezoo.core.reference.linear_recurrence import FORGETS
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents
from moezoo.core.spec import MambaSpec


def selective_scan(value_BTF: Array, log_decay_BTFZ: Array, key_BTZ: Array, query_BTZ: Array) -> Array:
    """Decay, extend and read the state h of each channel, Z numbers, token by token, in float32.

        h_t   = exp(log_decay_t) h_{t-1} + value_t key_t        h_{-1} = 0
        out_t = h_t . query_t

    Args:
        value_BTF: F channels.
        log_decay_BTFZ: <= 0; FORGETS begins with a state of 0.
        key_BTZ, query_BTZ: shared by all channels.

    Returns:
        [B, T, F].

    Source: Gu and Dao 2023, arXiv 2312.00752, algorithm 2, where key is B, query is C, and value the input times its
    step. The backends combine the tokens of a chunk pairwise (an associative scan), and pass the state between chunks.
    """
    state_BFZ, states = np.zeros((len(value_BTF), *log_decay_BTFZ.shape[2:])), []
    for t in range(value_BTF.shape[1]):
        added_BFZ = value_BTF[:, t, :, None] * key_BTZ[:, t, None, :]
        state_BFZ = np.exp(log_decay_BTFZ[:, t]) * state_BFZ + added_BFZ
        states.append(state_BFZ)
    return np.einsum("BTFZ,BTZ->BTF", np.stack(states, axis=1), query_BTZ)


def mamba(spec: MambaSpec, parameters: Parameters, x_BTD: Array, *, documents: Documents | None = None) -> Attended:
    """Mamba-1 layer: [B, T, D] -> [B, T, D]. Decay and convolution order the tokens; no position encoding.

        v         = silu(convolution(x w_value))
        step      = softplus(norm(v w_step_down) w_step + step_bias)
        log_decay = -exp(log_decay_rate) * step
        y         = selective_scan(step * v, log_decay, norm(v w_key), norm(v w_query)) + skip * v
        layer(x)  = (y * silu(x w_gate)) w_output

    The first token of each of the `documents` of packed sequences forgets everything.

    Source: Gu and Dao 2023, arXiv 2312.00752, section 3.4; norms: Lieber et al. 2024, arXiv 2403.19887 (Jamba).
    Differs: published checkpoints store values and gate in one matrix, and step, key and query in another.
    """
    value_BTF = adapter.einsum("BTD,DF->BTF", x_BTD, parameters["w_value"])
    gate_BTF = adapter.einsum("BTD,DF->BTF", x_BTD, parameters["w_gate"])
    if spec.bias:
        value_BTF, gate_BTF = value_BTF + parameters["b_value"], gate_BTF + parameters["b_gate"]
    value_BTF = causal_convolution(value_BTF, parameters["conv"], documents)
    value_BTF = silu(value_BTF + parameters["b_conv"] if spec.conv_bias else value_BTF)
    low_BTH = _normed(spec, parameters, "step_down", value_BTF)
    step_BTF = adapter.einsum("BTH,HF->BTF", low_BTH, parameters["w_step"]) + parameters["step_bias"]
    step_BTF = np.logaddexp(0.0, step_BTF)
    log_decay_BTFZ = -np.exp(parameters["log_decay_rate"]) * step_BTF[..., None]
    if documents is not None:
        log_decay_BTFZ = np.where(documents.position_BT[..., None, None] == 0, FORGETS, log_decay_BTFZ)
    key_BTZ, query_BTZ = (_normed(spec, parameters, which, value_BTF) for which in ("key", "query"))
    read_BTF = selective_scan(step_BTF * value_BTF, log_decay_BTFZ, key_BTZ, query_BTZ)
    read_BTF = (read_BTF + parameters["skip"] * value_BTF) * silu(gate_BTF)
    output = adapter.einsum("BTF,FD->BTD", read_BTF, parameters["w_output"])
    return Attended(output + parameters["b_output"] if spec.bias else output, None, None)


def _normed(spec: MambaSpec, parameters: Parameters, which: str, value_BTF: Array) -> Array:
    projected = adapter.einsum("BTF,FZ->BTZ", value_BTF, parameters[f"w_{which}"])
    return projected if spec.norm is None else normalize(spec.norm, inside(parameters, f"{which}_norm"), projected)
