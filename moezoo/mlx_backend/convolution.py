"""Causal convolutions. Spec: moezoo.core.reference.convolution."""

import math

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import ResidualConvolutionSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.positions import Documents, causal_windows
from moezoo.mlx_backend.quantization import as_array


class ResidualConvolution(nn.Module):
    """Spec: moezoo.core.reference.convolution.residual_convolution; after earlier inputs."""

    def __init__(self, spec: ResidualConvolutionSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.conv = weights.parameter("conv")
        if spec.dynamic:
            self.w_filter = weights.parameter("w_filter")

    def __call__(
        self,
        x: mx.array,
        source_BTD: mx.array | None = None,
        before: mx.array | None = None,
        *,
        real_BT: mx.array | None = None,
        documents: Documents | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Return the result in the dtype of x, and the last W - 1 inputs, of which `before` has those before x.

        Where a token is not real, but left padding, it is zero as an input.
        """
        spec, dtype = self.spec, x.dtype
        batch, length, *features = x.shape
        if real_BT is not None:
            x = mx.where(real_BT.reshape(batch, length, *(1,) * len(features)), x, 0).astype(dtype)
        if before is None:
            before = mx.zeros((batch, spec.width - 1, *features), dtype)
        if spec.dynamic:
            convolved = self._by_own_filters(x, source_BTD, before, documents)
        else:
            convolved = causal_convolution(x, self.conv, before, documents)
        out = x.astype(mx.float32) + convolved
        if spec.unit_variance:
            out = out / math.sqrt(1 + (2 if spec.dynamic else 1) * spec.width)
        return out.astype(dtype), mx.concatenate([before, x], axis=1)[:, length:]

    def _by_own_filters(
        self, x_BTMH: mx.array, source_BTD: mx.array | None, before_BSMH: mx.array, documents: Documents | None
    ) -> mx.array:
        """Convolve by the sum of the learned filter and the token's own."""
        assert source_BTD is not None
        width = self.spec.width
        w_filter = self.w_filter.astype(source_BTD.dtype)
        filter_BTMS = projection.einsum("BTD,DMS->BTMS", source_BTD, w_filter).astype(mx.float32)
        conv_WMH, total = as_array(self.conv).astype(mx.float32), mx.zeros(x_BTMH.shape, mx.float32)
        for back in range(width):
            only_W11 = (mx.arange(width) == width - 1 - back).astype(mx.float32)[:, None, None]
            row_BTMH = causal_convolution(x_BTMH, only_W11, before_BSMH, documents)
            total = total + (conv_WMH[back] + filter_BTMS[..., back, None]) * row_BTMH
        return total


def causal_convolution(
    x: mx.array, weight: mx.array, before: mx.array, documents: Documents | None = None, *, dilation: int = 1
) -> mx.array:
    """Spec: moezoo.core.reference.convolution.causal_convolution; after the inputs `before`, in float32."""
    weight = as_array(weight).astype(mx.float32)
    inputs = causal_windows(x.astype(mx.float32), before.astype(mx.float32), documents)[::dilation]
    rows = (own * row for own, row in zip(inputs, weight, strict=True))
    return sum(rows, mx.array(0.0))
