"""Routed experts: feed-forward layers of the same shape, each with its own weights and its own rows of tokens."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters
from moezoo.core.reference.feed_forward import feed_forward
from moezoo.core.spec import ExpertsSpec


def grouped_product(x_RD: Array, w_EDF: Array, size_E: Array) -> Array:
    """Grouped matrix product: multiply the rows of expert e by w_EDF[e].

    Args:
        x_RD: rows sorted by expert; those beyond the sum of `size_E` are unused.
        w_EDF: one matrix per expert.
        size_E: rows of each expert; sums to R or less.

    Returns:
        [R, F]. Unused rows are finite, and ignored; here they are zero.

    Source: Gale et al. 2022, arXiv 2211.15841 (grouped products for dropless MoE).
    """
    end_E = np.cumsum(size_E)
    groups = [x_RD[end - size : end] @ w for size, end, w in zip(size_E, end_E, w_EDF, strict=True)]
    return np.concatenate([*groups, np.zeros((x_RD.shape[0] - end_E[-1], w_EDF.shape[-1]))])


def experts(spec: ExpertsSpec, parameters: Parameters, x_RD: Array, size_E: Array) -> Array:
    """Apply each expert's feed-forward to its rows: [R, D] -> [R, D], rows sorted by expert, unused rows last.

    Parameters are those of a feed-forward layer with a leading axis E, biases too.
    """
    end_E = np.cumsum(size_E)
    groups = []
    for expert, (size, end) in enumerate(zip(size_E, end_E, strict=True)):
        own = {name: value[expert] for name, value in parameters.items()}
        groups.append(feed_forward(spec, own, x_RD[end - size : end]))
    return np.concatenate([*groups, np.zeros((x_RD.shape[0] - end_E[-1], x_RD.shape[1]))])
