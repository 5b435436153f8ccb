"""Dense feed-forward layers. Spec: moezoo.core.reference.feed_forward."""

import math
from typing import assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import ClampedSwiGLUSpec, FeedForwardSpec, GatedFeedForwardSpec, PlainFeedForwardSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels.x86 import gated_silu, is_x86_cpu, sigmoid
from moezoo.mlx_backend.runtime.streams import streams

_WITHOUT_EXPONENTIAL = {"relu", "relu_squared", "relu_squared_glu"}  # cheaper than concatenating the parts

MANY_ROWS = 512
"""From this number of rows on, copying what the backward pass needs costs less than keeping the rest alive."""


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

    def __call__(self, x: mx.array) -> mx.array:
        spec, dtype = self.spec, x.dtype
        gate = None
        if not isinstance(spec, PlainFeedForwardSpec):
            gate = mx.einsum("...D,DF->...F", x, self.w_gate.astype(dtype))
            gate = gate + self.b_gate.astype(dtype) if spec.bias else gate
        up = mx.einsum("...D,DF->...F", x, self.w_up.astype(dtype))
        up = up + self.b_up.astype(dtype) if spec.bias else up
        out = mx.einsum("...F,FD->...D", activate(spec, gate, up), self.w_down.astype(dtype))
        return out + self.b_down.astype(dtype) if spec.bias else out


def activate(spec: FeedForwardSpec, gate: mx.array | None, up: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.feed_forward.activate; on the CPU in parts, on two streams in turn."""
    turns = streams()
    if spec.kind == "swiglu" and is_x86_cpu():
        assert gate is not None
        rows = [x.reshape(-1, x.shape[-1]) for x in (gate, up)]
        return gated_silu(*rows, forget=len(rows[0]) > MANY_ROWS).reshape(up.shape)
    if len(turns) == 1 or spec.kind in _WITHOUT_EXPONENTIAL:
        return _activated(spec, gate, up)
    up_rows = up.reshape(-1, up.shape[-1])
    cuts = [len(up_rows) * turn // len(turns) for turn in range(1, len(turns))]
    gate_parts = [None] * len(turns) if gate is None else mx.split(gate.reshape(up_rows.shape), cuts)
    parts = []
    for stream, gate_part, up_part in zip(turns, gate_parts, mx.split(up_rows, cuts), strict=True):
        with mx.stream(stream):
            parts.append(_activated(spec, gate_part, up_part))
    return mx.concatenate(parts).reshape(up.shape)


def _activated(spec: FeedForwardSpec, gate: mx.array | None, up: mx.array) -> mx.array:
    match spec:
        case GatedFeedForwardSpec():
            assert gate is not None
            match spec.kind:
                case "swiglu":
                    return _silu(gate) * up
                case "geglu":
                    return _gelu(gate) * up
                case "relu_squared_glu":
                    return mx.square(mx.maximum(gate, 0)) * up
                case _:
                    assert_never(spec.kind)
        case ClampedSwiGLUSpec():
            assert gate is not None
            gate, up = mx.minimum(gate, spec.limit), mx.clip(up, -spec.limit, spec.limit)
            return gate * _sigmoid(spec.alpha * gate) * (up + 1)
        case PlainFeedForwardSpec():
            match spec.kind:
                case "relu":
                    return mx.maximum(up, 0)
                case "gelu":
                    return _gelu(up)
                case "relu_squared":
                    return mx.square(mx.maximum(up, 0))
                case _:
                    assert_never(spec.kind)
        case _:
            assert_never(spec)


def _silu(x: mx.array) -> mx.array:
    """SiLU, fused on the GPU; on the CPU, fusing would need a C++ compiler."""
    return nn.silu(x) if len(streams()) == 1 else x * mx.sigmoid(x)


def _sigmoid(x: mx.array) -> mx.array:
    return sigmoid(x) if is_x86_cpu() else mx.sigmoid(x)


def _gelu(x: mx.array) -> mx.array:
    """GELU by tanh, as x times a sigmoid: one exponential, and no cancellation."""
    return x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
