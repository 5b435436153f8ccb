"""Dense feed-forward layers. Spec: moezoo.core.reference.feed_forward."""

import math
from functools import partial
from typing import assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import (
    ClampedSwiGLUSpec,
    FeedForwardSpec,
    GatedFeedForwardSpec,
    PlainFeedForwardSpec,
    SoftcappedSwiGLUSpec,
)
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.activation import rows_in_turns, sigmoid, swiglu

_NOT_IN_TURNS = {"reglu", "relu", "relu_squared", "relu_squared_glu", "swiglu"}
"""Activations without exponentials, which cost less than concatenating parts, and one whose kernel has parts itself."""


class FeedForward(nn.Module):
    """Spec: moezoo.core.reference.feed_forward.feed_forward."""

    def __init__(self, spec: FeedForwardSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        if not isinstance(spec, PlainFeedForwardSpec):
            self.w_gate = weights.parameter("w_gate")
        self.w_up = weights.parameter("w_up")
        self.w_down = weights.parameter("w_down")
        if spec.bias:
            if not isinstance(spec, PlainFeedForwardSpec):
                self.b_gate = weights.parameter("b_gate")
            self.b_up = weights.parameter("b_up")
            self.b_down = weights.parameter("b_down")

    def __call__(self, x: mx.array, weight: mx.array | None = None) -> mx.array:
        spec, dtype = self.spec, x.dtype
        gate = None
        if not isinstance(spec, PlainFeedForwardSpec):
            gate = projection.einsum("...D,DF->...F", x, self.w_gate.astype(dtype))
            gate = gate + self.b_gate.astype(dtype) if spec.bias else gate
        up = projection.einsum("...D,DF->...F", x, self.w_up.astype(dtype))
        up = up + self.b_up.astype(dtype) if spec.bias else up
        activated = activate(spec, gate, up)
        activated = activated if weight is None else (activated * weight).astype(dtype)
        out = projection.einsum("...F,FD->...D", activated, self.w_down.astype(dtype))
        return out + self.b_down.astype(dtype) if spec.bias else out


def activate(spec: FeedForwardSpec, gate: mx.array | None, up: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.feed_forward.activate."""
    if spec.kind in _NOT_IN_TURNS:
        return _activated(spec, gate, up)
    return rows_in_turns(partial(_activated, spec), gate, up)


def _activated(spec: FeedForwardSpec, gate: mx.array | None, up: mx.array) -> mx.array:
    match spec:
        case GatedFeedForwardSpec(kind="swiglu", limit=None):
            assert gate is not None
            return swiglu(gate, up)
        case GatedFeedForwardSpec(limit=limit):
            assert gate is not None
            match spec.kind:
                case "swiglu":
                    factor = gate * sigmoid(gate)
                case "geglu":
                    factor = _gelu(gate)
                case "exact_geglu":
                    factor = nn.gelu(gate)
                case "reglu":
                    factor = mx.maximum(gate, 0)
                case "relu_squared_glu":
                    factor = mx.square(mx.maximum(gate, 0))
                case _:
                    assert_never(spec.kind)
            return factor * up if limit is None else mx.minimum(factor, limit) * mx.clip(up, -limit, limit)
        case ClampedSwiGLUSpec():
            assert gate is not None
            gate, up = mx.minimum(gate, spec.limit), mx.clip(up, -spec.limit, spec.limit)
            return gate * sigmoid(spec.alpha * gate) * (up + spec.up_offset)
        case SoftcappedSwiGLUSpec(gate_softcap=gate_cap, up_softcap=up_cap):
            assert gate is not None
            return gate_cap * mx.tanh(gate / gate_cap) * sigmoid(gate) * up_cap * mx.tanh(up / up_cap)
        case PlainFeedForwardSpec():
            match spec.kind:
                case "relu":
                    return mx.maximum(up, 0)
                case "gelu":
                    return _gelu(up)
                case "silu":
                    return up * sigmoid(up)
                case "relu_squared":
                    return mx.square(mx.maximum(up, 0))
                case _:
                    assert_never(spec.kind)
        case _:
            assert_never(spec)


def _gelu(x: mx.array) -> mx.array:
    """GELU by tanh, as x times a sigmoid: one exponential, and no cancellation."""
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
