"""Gated streams: several residual streams. Spec: moezoo.core.reference.gated_streams."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import NormSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.normalization import norm


class GatedRead(nn.Module):
    """Spec: moezoo.core.reference.gated_streams.read_gated; gates and mean in float32, cast back."""

    def __init__(self, norm_spec: NormSpec, weights: Weights):
        super().__init__()
        self.norm = norm(norm_spec, weights.inside("norm"))
        self.w_down = weights.parameter("w_down")
        self.w_up = weights.parameter("w_up")

    def __call__(self, x_BTJD: mx.array) -> mx.array:
        return self.gated(self.norm(x_BTJD))

    def gated(self, normed_BTJD: mx.array) -> mx.array:
        """Return the gated mean of normalized streams."""
        dtype = normed_BTJD.dtype
        down_BTZ = projection.einsum("BTJD,JDZ->BTZ", normed_BTJD, self.w_down.astype(dtype))
        down_BTZ = nn.silu(down_BTZ / normed_BTJD.shape[2])
        up_BTJD = projection.einsum("BTZ,ZJD->BTJD", down_BTZ, self.w_up.astype(dtype))
        gate_BTJD = mx.sigmoid(up_BTJD.astype(mx.float32))
        return mx.mean(gate_BTJD * normed_BTJD.astype(mx.float32), axis=2).astype(dtype)


class GatedStreams(GatedRead):
    """Spec: moezoo.core.reference.gated_streams, `read_gated` and `write_weights`; of one block."""

    def __init__(self, norm_spec: NormSpec, weights: Weights):
        super().__init__(norm_spec, weights)
        self.w_write = weights.parameter("w_write")

    def read(self, x_BTJD: mx.array, block: int) -> tuple[mx.array, mx.array]:
        """Spec: moezoo.core.reference.residual.read; the connection is the weights [B, T, J]."""
        normed_BTJD = self.norm(x_BTJD)
        logits_BTU = projection.einsum("BTJD,JDU->BTU", normed_BTJD, self.w_write.astype(x_BTJD.dtype))
        return self.gated(normed_BTJD), 2 * mx.sigmoid(logits_BTU.astype(mx.float32) / x_BTJD.shape[2])

    def write(self, x_BTJD: mx.array, connection: mx.array, out_BTD: mx.array, block: int) -> mx.array:
        """Spec: moezoo.core.reference.residual.write; in float32, cast back."""
        written = connection[..., None] * out_BTD[:, :, None].astype(mx.float32)
        return (x_BTJD.astype(mx.float32) + written).astype(x_BTJD.dtype)
