"""Causal convolutions. Spec: moezoo.core.reference.convolution."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import ResidualConvolutionSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.positions import Documents, causal_windows


class ResidualConvolution(nnx.Module):
    """Spec: moezoo.core.reference.convolution.residual_convolution; after earlier inputs."""

    def __init__(self, spec: ResidualConvolutionSpec, weights: Weights):
        self.spec = spec
        self.conv = weights.parameter("conv")
        if spec.dynamic:
            self.w_filter = weights.parameter("w_filter")

    def __call__(
        self,
        x: jax.Array,
        source_BTD: jax.Array | None = None,
        before: jax.Array | None = None,
        *,
        real_BT: jax.Array | None = None,
        documents: Documents | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Return the result in the dtype of x, and the last W - 1 inputs, of which `before` has those before x.

        Where a token is not real, but left padding, it is zero as an input.
        """
        spec, dtype = self.spec, x.dtype
        batch, length, *features = x.shape
        if real_BT is not None:
            x = jnp.where(real_BT.reshape(batch, length, *(1,) * len(features)), x, 0).astype(dtype)
        if before is None:
            before = jnp.zeros((batch, spec.width - 1, *features), dtype)
        if spec.dynamic:
            convolved = self._by_own_filters(x, source_BTD, before, documents)
        else:
            convolved = causal_convolution(x, self.conv[...], before, documents)
        out = x.astype(jnp.float32) + convolved
        if spec.unit_variance:
            out = out / math.sqrt(1 + (2 if spec.dynamic else 1) * spec.width)
        return out.astype(dtype), jnp.concatenate([before, x], axis=1)[:, length:]

    def _by_own_filters(
        self, x_BTMH: jax.Array, source_BTD: jax.Array | None, before_BSMH: jax.Array, documents: Documents | None
    ) -> jax.Array:
        """Convolve by the sum of the learned filter and the token's own."""
        assert source_BTD is not None
        width = self.spec.width
        w_filter = self.w_filter[...].astype(source_BTD.dtype)
        filter_BTMS = projection.einsum("BTD,DMS->BTMS", source_BTD, w_filter).astype(jnp.float32)
        conv_WMH, total = self.conv[...].astype(jnp.float32), jnp.zeros(x_BTMH.shape, jnp.float32)
        for back in range(width):
            only_W11 = (jnp.arange(width) == width - 1 - back).astype(jnp.float32)[:, None, None]
            row_BTMH = causal_convolution(x_BTMH, only_W11, before_BSMH, documents)
            total = total + (conv_WMH[back] + filter_BTMS[..., back, None]) * row_BTMH
        return total


def causal_convolution(
    x: jax.Array, weight: jax.Array, before: jax.Array, documents: Documents | None = None, *, dilation: int = 1
) -> jax.Array:
    """Spec: moezoo.core.reference.convolution.causal_convolution; after the inputs `before`, in float32."""
    weight = weight.astype(jnp.float32)
    inputs = causal_windows(x.astype(jnp.float32), before.astype(jnp.float32), documents)[::dilation]
    rows = (own * row for own, row in zip(inputs, weight, strict=True))
    convolved: jax.Array = sum(rows, jnp.float32(0))
    return convolved
