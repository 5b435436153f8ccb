"""Dense feed-forward layers. Spec: moezoo.core.reference.feed_forward."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import GatedFeedForwardSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.streams import streams


class SwiGLU(nn.Module):
    """Spec: moezoo.core.reference.feed_forward.swiglu."""

    def __init__(self, spec: GatedFeedForwardSpec, weights: Weights):
        super().__init__()
        self.w_gate = weights.parameter("w_gate")
        self.w_up = weights.parameter("w_up")
        self.w_down = weights.parameter("w_down")

    def __call__(self, x: mx.array) -> mx.array:
        gate = mx.einsum("...D,DF->...F", x, self.w_gate.astype(x.dtype))
        up = mx.einsum("...D,DF->...F", x, self.w_up.astype(x.dtype))
        return mx.einsum("...F,FD->...D", silu_gated(gate, up), self.w_down.astype(x.dtype))


def silu_gated(gate: mx.array, up: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.feed_forward.silu_gated; on the CPU in parts that take turns on two streams."""
    turns = streams()
    if len(turns) == 1:
        return nn.silu(gate) * up
    gate_rows, up_rows = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
    cuts = [len(gate_rows) * turn // len(turns) for turn in range(1, len(turns))]
    parts = []
    for stream, gate_part, up_part in zip(turns, mx.split(gate_rows, cuts), mx.split(up_rows, cuts), strict=True):
        with mx.stream(stream):
            parts.append(gate_part * mx.sigmoid(gate_part) * up_part)
    return mx.concatenate(parts).reshape(gate.shape)
