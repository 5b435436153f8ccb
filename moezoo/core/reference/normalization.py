"""Normalization layers."""

from typing import assert_never

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters
from moezoo.core.spec import LayerNormSpec, NormSpec, RMSNormSpec


def normalize(spec: NormSpec, parameters: Parameters, x: Array, axes: int = 1) -> Array:
    """Normalize over the last `axes` axes, which are the axes of the scale.

    Args:
        spec: the norm. `zero_centred` multiplies by `1 + scale`, `none` does not scale.
        parameters: `scale` [D], and `bias` [D] of a layer norm; with two axes [N, H], over all heads of a token. They
            may have more axes than the mean is over: each residual stream has its own.
        x: [..., D], or [..., N, H].
    """
    match spec:
        case RMSNormSpec():
            match spec.scale:
                case "learned":
                    return rms_norm(x, parameters["scale"], spec.epsilon, axes)
                case "zero_centred":
                    return rms_norm(x, 1 + parameters["scale"], spec.epsilon, axes)
                case "none":
                    return rms_norm(x, None, spec.epsilon, axes)
                case _:
                    assert_never(spec.scale)
        case LayerNormSpec():
            return layer_norm(x, parameters["scale"], parameters["bias"] if spec.bias else None, spec.epsilon, axes)
        case _:
            assert_never(spec)


def rms_norm(x: Array, scale: Array | None, epsilon: float, axes: int = 1) -> Array:
    """RMSNorm: `x / sqrt(mean(x^2) + epsilon) * scale`, in float32 for every compute dtype.

    Args:
        x: [..., D] activations.
        scale: [D], with as many axes as the mean is over, or None.
        epsilon: added to the mean of squares, not to its root.
        axes: number of trailing axes that the mean is over.

    Returns:
        [..., D].

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    Differs: epsilon is inside the root, as in every released model.
    """
    normed = x / np.sqrt(np.mean(x**2, axis=_last(axes), keepdims=True) + epsilon)
    return normed if scale is None else normed * scale


def layer_norm(x: Array, scale: Array, bias: Array | None, epsilon: float, axes: int = 1) -> Array:
    """LayerNorm: `(x - mean(x)) / sqrt(variance(x) + epsilon) * scale + bias`, in float32 for every compute dtype.

    Args:
        x: [..., D] activations.
        scale: [D], with as many axes as mean and variance are over.
        bias: like scale, or None.
        epsilon: added to the variance (the mean square of `x - mean(x)`), not to its root.
        axes: number of trailing axes that mean and variance are over.

    Returns:
        [..., D].

    Source: Ba et al. 2016, arXiv 1607.06450, section 3.
    Differs: epsilon, which the paper does not have.
    """
    centred = x - np.mean(x, axis=_last(axes), keepdims=True)
    normed = rms_norm(centred, scale, epsilon, axes)
    return normed if bias is None else normed + bias


def norm_gate(parameters: Parameters, x: Array) -> Array:
    """Gate of a normalized input by itself, at low rank: `x * sigmoid(silu(x w_down) w_up)`.

    Args:
        parameters: `w_down` [D, Z] and `w_up` [Z, D].
        x: [..., D], behind its norm.

    Source: SK Telecom 2026 (A.X-K2), released code: transformers 5.23, axk2.
    """
    down = np.einsum("BTD,DZ->BTZ", x, parameters["w_down"])
    up = np.einsum("BTZ,ZD->BTD", down / (1 + np.exp(-down)), parameters["w_up"])
    return x / (1 + np.exp(-up))


def l2_clipped(x: Array, threshold: float) -> Array:
    """Shorten vectors of the last axis to an L2 norm of `threshold` if they are longer: `x min(1, threshold / |x|)`.

    1e-6 is added to |x|. Source: Thinking Machines 2026 (Inkling 2; transformers 5.23, `Inkling2L2Clip`).
    """
    # Trap: the gradient of a root is infinite at 0; vectors that short are not clipped.
    length = np.sqrt(np.maximum(np.sum(x**2, axis=-1, keepdims=True), 1e-30))
    return x * np.minimum(1.0, threshold / (length + 1e-6))


def _last(axes: int) -> tuple[int, ...]:
    return tuple(range(-axes, 0))
