"""Dense feed-forward layers. Spec: moezoo.core.reference.feed_forward."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import SwiGLUSpec
from moezoo.mlx_backend.arrays import Weights


class SwiGLU(nn.Module):
    """Spec: moezoo.core.reference.feed_forward.swiglu."""

    def __init__(self, spec: SwiGLUSpec, weights: Weights):
        super().__init__()
        self.w_gate = weights.parameter("w_gate")
        self.w_up = weights.parameter("w_up")
        self.w_down = weights.parameter("w_down")

    def __call__(self, x: mx.array) -> mx.array:
        gate = mx.einsum("...D,DF->...F", x, self.w_gate.astype(x.dtype))
        up = mx.einsum("...D,DF->...F", x, self.w_up.astype(x.dtype))
        return mx.einsum("...F,FD->...D", nn.silu(gate) * up, self.w_down.astype(x.dtype))
