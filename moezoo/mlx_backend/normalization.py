"""Normalization layers. Spec: moezoo.core.reference.normalization."""

from typing import assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import LayerNormSpec, NormSpec, RMSNormSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.normalization import rms_norm


class RMSNorm(nn.Module):
    """Spec: moezoo.core.reference.normalization.rms_norm; in float32."""

    def __init__(self, spec: RMSNormSpec, weights: Weights, axes: int = 1):
        super().__init__()
        self.spec, self.axes = spec, axes
        if spec.scale != "none":
            self.scale = weights.parameter("scale")

    def __call__(self, x: mx.array) -> mx.array:
        scale = self._multiplier()
        if scale is not None and scale.ndim > self.axes:  # one for each stream
            normed = rms_norm(_flat(x, self.axes), None, self.spec.epsilon).reshape(x.shape) * scale
            return normed.astype(x.dtype)
        normed = rms_norm(_flat(x, self.axes), None if scale is None else scale.reshape(-1), self.spec.epsilon)
        return normed.reshape(x.shape).astype(x.dtype)

    def _multiplier(self) -> mx.array | None:
        match self.spec.scale:
            case "learned":
                return self.scale.astype(mx.float32)
            case "zero_centred":
                return 1 + self.scale.astype(mx.float32)
            case "none":
                return None
            case _:
                assert_never(self.spec.scale)


class LayerNorm(nn.Module):
    """Spec: moezoo.core.reference.normalization.layer_norm; the fused kernel accumulates in float32."""

    def __init__(self, spec: LayerNormSpec, weights: Weights, axes: int = 1):
        super().__init__()
        self.epsilon, self.axes = spec.epsilon, axes
        self.scale = weights.parameter("scale")
        self.bias = weights.parameter("bias") if spec.bias else None

    def __call__(self, x: mx.array) -> mx.array:
        scale = self.scale.astype(mx.float32)
        bias = None if self.bias is None else self.bias.astype(mx.float32)
        if scale.ndim > self.axes:  # one for each stream
            normed = mx.fast.layer_norm(_flat(x, self.axes), None, None, self.epsilon).reshape(x.shape) * scale
            return (normed if bias is None else normed + bias).astype(x.dtype)
        bias = None if bias is None else bias.reshape(-1)
        normed = mx.fast.layer_norm(_flat(x, self.axes), scale.reshape(-1), bias, self.epsilon)
        return normed.reshape(x.shape).astype(x.dtype)


class NormGate(nn.Module):
    """Spec: moezoo.core.reference.normalization.norm_gate; the gate in float32."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.w_down = weights.parameter("w_down")
        self.w_up = weights.parameter("w_up")

    def __call__(self, x: mx.array) -> mx.array:
        down = projection.einsum("BTD,DZ->BTZ", x, self.w_down.astype(x.dtype))
        up = projection.einsum("BTZ,ZD->BTD", nn.silu(down), self.w_up.astype(x.dtype))
        return (x * mx.sigmoid(up.astype(mx.float32))).astype(x.dtype)


def l2_clipped(x: mx.array, threshold: float) -> mx.array:
    """Spec: moezoo.core.reference.normalization.l2_clipped; of float32."""
    length = mx.sqrt(mx.maximum(mx.sum(mx.square(x), axis=-1, keepdims=True), 1e-30))
    return x * mx.minimum(1.0, threshold / (length + 1e-6))


def norm(spec: NormSpec, weights: Weights, axes: int = 1) -> RMSNorm | LayerNorm:
    """Spec: moezoo.core.reference.normalization.normalize."""
    match spec:
        case RMSNormSpec():
            return RMSNorm(spec, weights, axes)
        case LayerNormSpec():
            return LayerNorm(spec, weights, axes)
        case _:
            assert_never(spec)


def _flat(x: mx.array, axes: int) -> mx.array:
    """Cast to float32, and merge the axes to normalize over: the kernels normalize over the last axis."""
    return x.astype(mx.float32).reshape(*x.shape[: x.ndim - axes], -1)
