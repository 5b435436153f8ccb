"""Routed experts: the same feed-forward many times, each with its own weights and its own rows."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters
from moezoo.core.reference.feed_forward import swiglu


def grouped_product(x_RD: Array, w_EDF: Array, size_E: Array) -> Array:
    """Multiply consecutive groups of rows by consecutive matrices: rows of expert e by w_EDF[e].

    Args:
        x_RD: rows sorted by expert.
        w_EDF: one matrix an expert.
        size_E: rows of each expert; sums to R.

    Returns:
        [R, F].

    Source: Gale et al. 2022, arXiv 2211.15841 (grouped products for dropless MoE).
    """
    end_E = np.cumsum(size_E)
    return np.concatenate([x_RD[end - size : end] @ w for size, end, w in zip(size_E, end_E, w_EDF, strict=True)])


def swiglu_experts(parameters: Parameters, x_RD: Array, size_E: Array) -> Array:
    """Expert e's SwiGLU on each of its rows: [R, D] -> [R, D], rows sorted by expert."""
    end_E = np.cumsum(size_E)
    groups = []
    for expert, (size, end) in enumerate(zip(size_E, end_E, strict=True)):
        own = {name: value[expert] for name, value in parameters.items()}
        groups.append(swiglu(own, x_RD[end - size : end]))
    return np.concatenate(groups)
