"""Causal depthwise convolutions, and those with a residual connection."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter
from moezoo.core.reference.positions import Documents, causal_windows
from moezoo.core.spec import ResidualConvolutionSpec


def causal_convolution(x: Array, weight: Array, documents: Documents | None = None, *, dilation: int = 1) -> Array:
    """Causal depthwise convolution over time, `sum over w of weight[w] x[t - dilation (W - 1 - w)]`.

    Args:
        x: [B, T, ...]; tokens before the first are zero.
        weight: [W, ...]; its last row multiplies the token itself.
        documents: those of packed sequences; tokens before the first of each are zero.
        dilation: distance between the tokens that a filter sees.

    Returns:
        The shape of x.

    Source: So et al. 2021, arXiv 2109.08668 (Primer); Yang et al. 2024, arXiv 2412.06464, section 3.4.
    """
    rows = causal_windows(x, dilation * (len(weight) - 1) + 1, documents)[::dilation]
    return sum(row * own for row, own in zip(rows, weight, strict=True))


def residual_convolution(
    spec: ResidualConvolutionSpec,
    parameters: Parameters,
    x: Array,
    source_BTD: Array | None = None,
    documents: Documents | None = None,
) -> Array:
    """Add its short convolution to x: `x[t] + sum over w of filter[w] x[t - w]`, in float32.

    With `dynamic` the filter of token t is the sum of a learned one and of `source_t w_filter`, one number per head.
    With `unit_variance` the sum is divided by sqrt(1 + W), or by sqrt(1 + 2 W) if it is dynamic.

    Args:
        parameters: `conv` [W, ...], whose last row multiplies the token itself, as in `causal_convolution`; of a
            dynamic one [W, M, H], whose first row does, and `w_filter` [D, M, W].
        x: [B, T, ...]; of a dynamic one [B, T, M, H].
        source_BTD: what x is projected from; only a dynamic one reads it.
        documents: those of packed sequences; tokens before the first of each are zero.

    Source: see ResidualConvolutionSpec.
    """
    width = spec.width
    if not spec.dynamic:
        terms, out = 1 + width, x + causal_convolution(x, parameters["conv"], documents)
    else:
        filter_BTMS = adapter.einsum("BTD,DMS->BTMS", source_BTD, parameters["w_filter"])
        shifted = [
            causal_convolution(x, np.eye(width)[width - 1 - back][:, None, None], documents) for back in range(width)
        ]
        out = x + sum(
            (parameters["conv"][back] + filter_BTMS[..., back, None]) * row for back, row in enumerate(shifted)
        )
        terms = 1 + 2 * width
    return out / np.sqrt(terms) if spec.unit_variance else out
