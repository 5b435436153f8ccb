"""Hyper-connections: several residual streams, and blocks that weigh them token by token."""

from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters
from moezoo.core.reference.normalization import rms_norm
from moezoo.core.spec import GatedStreamsSpec, HyperConnectionsSpec


class Connection(NamedTuple):
    """Weights with which the output of a block and the streams are joined.

    Fields:
        write_BTJ: of the block's output, for each stream.
        mix_BTIU: of stream I before the block in stream U after it; None: each stream continues alone.
    """

    write_BTJ: Array
    mix_BTIU: Array | None


def enter_streams(spec: HyperConnectionsSpec | GatedStreamsSpec, x_BTD: Array) -> Array:
    """Return `num_streams` copies of the embeddings, [B, T, J, D]."""
    return np.repeat(x_BTD[:, :, None], spec.num_streams, axis=2)


def read_streams(spec: HyperConnectionsSpec, parameters: Parameters, x_BTJD: Array) -> tuple[Array, Connection]:
    """Return the input of a block, and the weights with which its output will be written.

    With y the streams of a token as one vector, normalized without a scale, all weights are functions of y:

    - input: `sum_j read_j x_j`, where `read = sigmoid(read_scale (y w_read) + b_read) + epsilon`;
    - output f: stream u becomes `write_u f + sum_i mix_iu x_i`, where `write = magnitude sigmoid(write_scale (y
      w_write) + b_write) + write_epsilon` and `mix = sinkhorn(mix_scale (y w_mix) + b_mix)`; without iterations mix is
      the identity.

    Args:
        parameters: `w_read`, `w_write` [J, D, J], `w_mix` [J, D, J, J], biases of their outputs, and three scales [1].
        x_BTJD: the streams.

    Source: Xie et al. 2025, arXiv 2512.24880 (mHC), section 4.2, and the models that have it in transformers 5.23:
    `deepseek_v4`, and `hy_v4` without `mix`; after Zhu et al. 2024, arXiv 2409.19606.
    Differs: the scale of the paper's norm is part of the matrices, as in both models.
    """
    y_BTJD = rms_norm(x_BTJD, None, spec.norm_epsilon, axes=2)
    read_BTJ = _sigmoid(parameters, "read", y_BTJD) + spec.epsilon
    write_BTJ = spec.magnitude * _sigmoid(parameters, "write", y_BTJD) + spec.write_epsilon
    mix_BTIU = None
    if spec.sinkhorn_iterations is not None:
        logits_BTIU = np.einsum("BTJD,JDIU->BTIU", y_BTJD, parameters["w_mix"])
        logits_BTIU = parameters["mix_scale"] * logits_BTIU + parameters["b_mix"]
        mix_BTIU = sinkhorn(logits_BTIU, spec.sinkhorn_iterations, spec.epsilon)
    return np.einsum("BTJ,BTJD->BTD", read_BTJ, x_BTJD), Connection(write_BTJ, mix_BTIU)


def write_streams(x_BTJD: Array, connection: Connection, out_BTD: Array) -> Array:
    """Return the streams after a block, by the formula of `read_streams`."""
    kept = x_BTJD
    if connection.mix_BTIU is not None:
        kept = np.einsum("BTIU,BTID->BTUD", connection.mix_BTIU, x_BTJD)
    return kept + connection.write_BTJ[..., None] * out_BTD[:, :, None]


def merge_streams(spec: HyperConnectionsSpec, parameters: Parameters, x_BTJD: Array) -> Array:
    """Return the input of the final norm: the input that a block would read, or the mean of the streams: [B, T, D].

    Source: the models of `read_streams`; the mean: Z.ai 2026 (GLM-5.3), transformers 5.23, `Glm5NextTextHyperHead`.
    """
    if spec.final_read == "mean":
        return np.mean(x_BTJD, axis=2)
    y_BTJD = rms_norm(x_BTJD, None, spec.norm_epsilon, axes=2)
    return np.einsum("BTJ,BTJD->BTD", _sigmoid(parameters, "read", y_BTJD) + spec.epsilon, x_BTJD)


def sinkhorn(logits: Array, iterations: int, epsilon: float) -> Array:
    """Return a nearly doubly stochastic matrix: rows by softmax, then columns and rows normalized in turns.

    The first iteration is `softmax(logits) + epsilon` over the columns of a row, divided by the sums of columns; each
    further one divides by the sums of rows, then of columns. `epsilon` is added to each sum.

    Args:
        logits: [..., I, U].
        iterations: at least one.

    Source: Sinkhorn and Knopp 1967; transformers 5.23, `deepseek_v4` (DeepseekV4HyperConnection).
    """
    powers = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    matrix = powers / np.sum(powers, axis=-1, keepdims=True) + epsilon
    matrix = matrix / (np.sum(matrix, axis=-2, keepdims=True) + epsilon)
    for _ in range(iterations - 1):
        matrix = matrix / (np.sum(matrix, axis=-1, keepdims=True) + epsilon)
        matrix = matrix / (np.sum(matrix, axis=-2, keepdims=True) + epsilon)
    return matrix


def _sigmoid(parameters: Parameters, name: str, y_BTJD: Array) -> Array:
    logits_BTI = np.einsum("BTJD,JDI->BTI", y_BTJD, parameters[f"w_{name}"])
    return 1 / (1 + np.exp(-parameters[f"{name}_scale"] * logits_BTI - parameters[f"b_{name}"]))
