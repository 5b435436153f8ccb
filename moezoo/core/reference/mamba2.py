"""Mamba-2: a state-space layer with a scalar decay per head."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter
from moezoo.core.reference.attention import Attended
from moezoo.core.reference.convolution import causal_convolution
from moezoo.core.reference.feed_forward import silu
from moezoo.core.reference.linear_recurrence import FORGETS, linear_recurrence
from moezoo.core.reference.normalization import rms_norm
from moezoo.core.reference.positions import Documents
from moezoo.core.spec import Mamba2Spec


def mamba2(spec: Mamba2Spec, parameters: Parameters, x_BTD: Array, *, documents: Documents | None = None) -> Attended:
    """Mamba-2 layer: [B, T, D] -> [B, T, D]. Decay and convolution order the tokens; no position encoding.

    Order: project; convolve and apply silu to values, keys and queries; the recurrence; add the values times `skip`;
    multiply by silu of a gate; normalize over the features of a group of heads; output projection.

        step      = clip(softplus(x w_step + step_bias), min_step, max_step)
        log_decay = -exp(log_decay_rate) * step
        out       = linear_recurrence(query, key, step * value, log_decay) + skip * value

    The first token of each of the `documents` of packed sequences forgets everything.

    Source: Dao and Gu 2024, arXiv 2405.21060, section 7; norm by groups and order of gate and norm: the authors' code.
    Differs: query, key and value are the paper's C, B and X; H is its state width N, and Z its head width P.
    `log_decay_rate` is A_log, `step_bias` dt_bias and `skip` D of published checkpoints.
    """
    projected = {}
    for which in ("value", "key", "query"):
        own = _projected(spec, parameters, which, x_BTD)
        own = causal_convolution(own, parameters[f"conv_{which}"], documents)
        projected[which] = silu(own + parameters[f"b_conv_{which}"] if spec.conv_bias else own)
    gate, value = _projected(spec, parameters, "gate", x_BTD), projected["value"]
    step_BTN = adapter.einsum("BTD,DN->BTN", x_BTD, parameters["w_step"]) + parameters["step_bias"]
    step_BTN = np.logaddexp(0.0, step_BTN + parameters["b_step"] if spec.bias else step_BTN)
    step_BTN = np.maximum(step_BTN, spec.min_step)
    step_BTN = step_BTN if spec.max_step is None else np.minimum(step_BTN, spec.max_step)
    log_decay = -np.exp(parameters["log_decay_rate"]) * step_BTN
    if documents is not None:
        log_decay = np.where(documents.position_BT[..., None] == 0, FORGETS, log_decay)
    grouped = (*x_BTD.shape[:2], spec.num_groups, -1)
    read = linear_recurrence(
        projected["query"],
        projected["key"],
        (step_BTN[..., None] * value).reshape(*grouped, spec.head_dim),
        log_decay.reshape(grouped),
    )
    read = (read.reshape(value.shape) + parameters["skip"][:, None] * value) * silu(gate)
    normed = rms_norm(read.reshape(grouped), None, spec.norm_epsilon).reshape(value.shape) * parameters["norm_scale"]
    output = adapter.einsum("BTNZ,NZD->BTD", normed, parameters["w_output"])
    return Attended(output + parameters["b_output"] if spec.bias else output, None, None)


def _projected(spec: Mamba2Spec, parameters: Parameters, which: str, x_BTD: Array) -> Array:
    projected = adapter.einsum("BTD,DNZ->BTNZ", x_BTD, parameters[f"w_{which}"])
    return projected + parameters[f"b_{which}"] if spec.bias else projected
