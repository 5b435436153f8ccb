"""Normalization layers."""

from typing import assert_never

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters
from moezoo.core.spec import LayerNormSpec, NormSpec, RMSNormSpec


def normalize(spec: NormSpec, parameters: Parameters, x: Array) -> Array:
    """Normalize over as many last axes as the scale has; over the last one where there is no scale.

    Args:
        spec: which norm. `zero_centred` multiplies by `1 + scale`, `none` by nothing.
        parameters: `scale` [D], and the `bias` of a layer norm likewise; [N, H] for all heads of a token at once.
        x: [..., D], or [..., N, H].
    """
    match spec:
        case RMSNormSpec():
            match spec.scale:
                case "learned":
                    return rms_norm(x, parameters["scale"], spec.epsilon)
                case "zero_centred":
                    return rms_norm(x, 1 + parameters["scale"], spec.epsilon)
                case "none":
                    return rms_norm(x, None, spec.epsilon)
                case _:
                    assert_never(spec.scale)
        case LayerNormSpec():
            return layer_norm(x, parameters["scale"], parameters["bias"] if spec.bias else None, spec.epsilon)
        case _:
            assert_never(spec)


def rms_norm(x: Array, scale: Array | None, epsilon: float) -> Array:
    """`x / sqrt(mean(x^2) + epsilon) * scale`, in float32 whatever the compute dtype.

    Args:
        x: [..., D] activations.
        scale: [D]; the mean is taken over as many last axes as it has. None: over the last one, and no scale.
        epsilon: added to the mean of squares, not to its root.

    Returns:
        [..., D].

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    Differs: epsilon inside the root, as every released model has it.
    """
    normed = x / np.sqrt(np.mean(x**2, axis=_axes(scale), keepdims=True) + epsilon)
    return normed if scale is None else normed * scale


def layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """`(x - mean(x)) / sqrt(variance(x) + epsilon) * scale + bias`, in float32 whatever the compute dtype.

    Args:
        x: [..., D] activations.
        scale: [D]; mean and variance are taken over as many last axes as it has.
        bias: as scale, or None.
        epsilon: added to the variance (the mean square of `x - mean(x)`), not to its root.

    Returns:
        [..., D].

    Source: Ba et al. 2016, arXiv 1607.06450, eq. 4.
    Differs: epsilon, which the paper does not have.
    """
    centred = x - np.mean(x, axis=_axes(scale), keepdims=True)
    normed = rms_norm(centred, scale, epsilon)
    return normed if bias is None else normed + bias


def _axes(scale: Array | None) -> tuple[int, ...]:
    return (-1,) if scale is None else tuple(range(-scale.ndim, 0))
