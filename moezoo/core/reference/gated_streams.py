"""Gated streams: several residual streams, each normalized, of which a block reads a mean that is gated by feature."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, inside
from moezoo.core.reference.normalization import normalize
from moezoo.core.spec import NormSpec


def read_gated(norm: NormSpec, parameters: Parameters, x_BTJD: Array) -> Array:
    """Return what a block reads of J streams: the mean of `gate_j n_j` over them, [B, T, D].

    With n the normalized streams, `gate = sigmoid(silu(n w_down / J) w_up)`, of all numbers of all streams together.

    Args:
        norm: the model's norm; each stream is normalized by itself, with a scale of its own.
        parameters: `norm` with scale [J, D], `w_down` [J, D, Z], `w_up` [Z, J, D].
        x_BTJD: the streams.

    Source: Qwen Team 2026 (Qwen4; transformers 5.23, `Qwen4ExpTextGatedResidual`).
    """
    normed_BTJD = normalize(norm, inside(parameters, "norm"), x_BTJD)
    down_BTZ = np.einsum("BTJD,JDZ->BTZ", normed_BTJD, parameters["w_down"]) / x_BTJD.shape[2]
    down_BTZ = down_BTZ / (1 + np.exp(-down_BTZ))
    up_BTJD = np.einsum("BTZ,ZJD->BTJD", down_BTZ, parameters["w_up"])
    return np.mean(normed_BTJD / (1 + np.exp(-up_BTJD)), axis=2)


def write_weights(norm: NormSpec, parameters: Parameters, x_BTJD: Array) -> Array:
    """Return the weight of a block's output for each stream, [B, T, J]: `2 sigmoid(n w_write / J)`, n of `read_gated`.

    Args:
        norm: the model's norm.
        parameters: `norm`, and `w_write` [J, D, J].
        x_BTJD: the streams that the block read.
    """
    normed_BTJD = normalize(norm, inside(parameters, "norm"), x_BTJD)
    logits_BTU = np.einsum("BTJD,JDU->BTU", normed_BTJD, parameters["w_write"]) / x_BTJD.shape[2]
    return 2 / (1 + np.exp(-logits_BTU))
