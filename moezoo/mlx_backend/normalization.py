"""Normalization layers. Spec: moezoo.core.reference.normalization."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import NormSpec
from moezoo.mlx_backend.arrays import Weights


class RMSNorm(nn.Module):
    """Spec: moezoo.core.reference.normalization.rms_norm; the fused kernel accumulates in float32."""

    def __init__(self, spec: NormSpec, weights: Weights):
        super().__init__()
        self.scale = weights.parameter("scale")
        self.epsilon = spec.epsilon

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x.astype(mx.float32), self.scale, self.epsilon).astype(x.dtype)
