"""Dense feed-forward layers."""

import math
from typing import assert_never

import autograd.numpy as np
import numpy as onp
from autograd.extend import defvjp, primitive

from moezoo.core.reference import Array, Parameters, adapter
from moezoo.core.spec import (
    ClampedSwiGLUSpec,
    FeedForwardSpec,
    GatedFeedForwardSpec,
    PlainFeedForwardSpec,
    SoftcappedSwiGLUSpec,
)


def feed_forward(spec: FeedForwardSpec, parameters: Parameters, x: Array, weight: Array | None = None) -> Array:
    """Feed-forward layer with F hidden features: `activate(x w_gate + b_gate, x w_up + b_up) w_down + b_down`.

    Args:
        spec: the activation, and whether there are biases; a plain activation has no gate.
        parameters: `w_gate` and `w_up` [D, F], `w_down` [F, D]; with biases `b_gate` and `b_up` [F], `b_down` [D].
        x: [..., D].
        weight: [..., F], multiplies the activated features; None: no weights.

    Returns:
        [..., D].

    Source: Shazeer 2020, arXiv 2002.05202, eq. 6; without a gate: Vaswani et al. 2017, arXiv 1706.03762, eq. 2.
    """
    gate = None
    if not isinstance(spec, PlainFeedForwardSpec):
        gate = adapter.einsum("...D,DF->...F", x, parameters["w_gate"])
        gate = gate + parameters["b_gate"] if spec.bias else gate
    up = adapter.einsum("...D,DF->...F", x, parameters["w_up"])
    up = up + parameters["b_up"] if spec.bias else up
    activated = activate(spec, gate, up) if weight is None else activate(spec, gate, up) * weight
    out = adapter.einsum("...F,FD->...D", activated, parameters["w_down"])
    return out + parameters["b_down"] if spec.bias else out


def activate(spec: FeedForwardSpec, gate: Array | None, up: Array) -> Array:
    """Apply the activation between the two matrix products, elementwise; gate and up are [..., F], a plain gate None.

    | kind | result |
    |---|---|
    | swiglu, geglu, exact_geglu, reglu | `f(gate) * up` with f silu, gelu, exact_gelu, relu |
    | relu_squared_glu | `relu(gate)^2 * up` |
    | any of these with `limit` | the first factor at most `limit`, up in [-`limit`, `limit`] |
    | clamped_swiglu | `gate * sigmoid(alpha gate) * (up + up_offset)`, gate <= `limit`, up in [-`limit`, `limit`] |
    | softcapped_swiglu | `cap(gate) * sigmoid(gate) * cap(up)` with `cap(x) = c tanh(x / c)`, each with its own c |
    | relu, gelu, silu, relu_squared | `f(up)` |
    """
    match spec:
        case GatedFeedForwardSpec(limit=limit):
            match spec.kind:
                case "swiglu":
                    factor = silu(gate)
                case "geglu":
                    factor = gelu(gate)
                case "exact_geglu":
                    factor = exact_gelu(gate)
                case "reglu":
                    factor = relu(gate)
                case "relu_squared_glu":
                    factor = relu(gate) ** 2
                case _:
                    assert_never(spec.kind)
            return factor * up if limit is None else np.minimum(factor, limit) * np.clip(up, -limit, limit)
        case ClampedSwiGLUSpec():
            gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
            return gate * sigmoid(spec.alpha * gate) * (up + spec.up_offset)
        case SoftcappedSwiGLUSpec(gate_softcap=gate_cap, up_softcap=up_cap):
            assert gate is not None
            return gate_cap * np.tanh(gate / gate_cap) * sigmoid(gate) * up_cap * np.tanh(up / up_cap)
        case PlainFeedForwardSpec():
            match spec.kind:
                case "relu":
                    return relu(up)
                case "gelu":
                    return gelu(up)
                case "silu":
                    return silu(up)
                case "relu_squared":
                    return relu(up) ** 2
                case _:
                    assert_never(spec.kind)
        case _:
            assert_never(spec)


def sigmoid(x: Array) -> Array:
    """Logistic sigmoid, `1 / (1 + exp(-x))`, computed by tanh, which does not overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def silu(x: Array) -> Array:
    """SiLU (swish), `x * sigmoid(x)`. Source: Elfwing et al. 2017, arXiv 1702.03118."""
    return x * sigmoid(x)


def gelu(x: Array) -> Array:
    """GELU by tanh: `x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2.
    Differs: at most 5e-4 from the exact form by erf.
    """
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


_erf = primitive(onp.vectorize(math.erf, otypes=[float]))
defvjp(_erf, lambda _, x: lambda gradient: gradient * 2 / math.sqrt(math.pi) * np.exp(-(x**2)))


def exact_gelu(x: Array) -> Array:
    """GELU, `x / 2 * (1 + erf(x / sqrt(2)))`. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2."""
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def relu(x: Array) -> Array:
    """ReLU, `max(x, 0)`, with gradient 0 at 0."""
    return np.where(x > 0, x, 0.0)
