"""Dense feed-forward layers."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters


def silu(x: Array) -> Array:
    """`x * sigmoid(x)`, also called swish. Source: Elfwing et al. 2017, arXiv 1702.03118."""
    return x * 0.5 * (1 + np.tanh(0.5 * x))


def silu_gated(gate: Array, up: Array) -> Array:
    """`silu(gate) * up`, elementwise: what stands between the products of SwiGLU. Both [..., F]."""
    return silu(gate) * up


def swiglu(parameters: Parameters, x: Array) -> Array:
    """`(silu(x w_gate) * (x w_up)) w_down`: [..., D] -> [..., D], through F hidden features.

    Source: Shazeer 2020, arXiv 2002.05202, eq. 6, without biases.
    """
    gate = np.einsum("...D,DF->...F", x, parameters["w_gate"])
    up = np.einsum("...D,DF->...F", x, parameters["w_up"])
    return np.einsum("...F,FD->...D", silu_gated(gate, up), parameters["w_down"])
