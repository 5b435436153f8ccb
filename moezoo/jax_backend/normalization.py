"""Normalization layers. Spec: moezoo.core.reference.normalization."""

from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import LayerNormSpec, NormSpec, RMSNormSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kernels import projection


class RMSNorm(nnx.Module):
    """Spec: moezoo.core.reference.normalization.rms_norm."""

    def __init__(self, spec: RMSNormSpec, weights: Weights, axes: int = 1):
        self.spec, self.axes = spec, axes
        if spec.scale != "none":
            self.scale = weights.parameter("scale")

    def __call__(self, x: jax.Array) -> jax.Array:
        return _rms_norm(x.astype(jnp.float32), self._multiplier(), self.spec.epsilon, self.axes).astype(x.dtype)

    def _multiplier(self) -> jax.Array | None:
        match self.spec.scale:
            case "learned":
                return self.scale[...].astype(jnp.float32)
            case "zero_centred":
                return 1 + self.scale[...].astype(jnp.float32)
            case "none":
                return None
            case _:
                assert_never(self.spec.scale)


class LayerNorm(nnx.Module):
    """Spec: moezoo.core.reference.normalization.layer_norm."""

    def __init__(self, spec: LayerNormSpec, weights: Weights, axes: int = 1):
        self.epsilon, self.axes = spec.epsilon, axes
        self.scale = weights.parameter("scale")
        self.bias = weights.parameter("bias") if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=_last(self.axes), keepdims=True)
        normed = _rms_norm(centred, self.scale[...].astype(jnp.float32), self.epsilon, self.axes)
        return (normed if self.bias is None else normed + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class NormGate(nnx.Module):
    """Spec: moezoo.core.reference.normalization.norm_gate; the gate in float32."""

    def __init__(self, weights: Weights):
        self.w_down = weights.parameter("w_down")
        self.w_up = weights.parameter("w_up")

    def __call__(self, x: jax.Array) -> jax.Array:
        down = projection.einsum("BTD,DZ->BTZ", x, self.w_down[...].astype(x.dtype))
        up = projection.einsum("BTZ,ZD->BTD", jax.nn.silu(down), self.w_up[...].astype(x.dtype))
        return (x * jax.nn.sigmoid(up.astype(jnp.float32))).astype(x.dtype)


def l2_clipped(x: jax.Array, threshold: float) -> jax.Array:
    """Spec: moezoo.core.reference.normalization.l2_clipped; of float32."""
    length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-30))
    return x * jnp.minimum(1.0, threshold / (length + 1e-6))


def norm(spec: NormSpec, weights: Weights, axes: int = 1) -> RMSNorm | LayerNorm:
    """Spec: moezoo.core.reference.normalization.normalize."""
    match spec:
        case RMSNormSpec():
            return RMSNorm(spec, weights, axes)
        case LayerNormSpec():
            return LayerNorm(spec, weights, axes)
        case _:
            assert_never(spec)


def _rms_norm(x: jax.Array, scale: jax.Array | None, epsilon: float, axes: int) -> jax.Array:
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=_last(axes), keepdims=True) + epsilon)
    return normed if scale is None else normed * scale


def _last(axes: int) -> tuple[int, ...]:
    return tuple(range(-axes, 0))
