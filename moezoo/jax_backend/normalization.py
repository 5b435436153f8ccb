"""Normalization layers. Spec: moezoo.core.reference.normalization."""

from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import LayerNormSpec, NormSpec, RMSNormSpec
from moezoo.jax_backend.arrays import Weights


class RMSNorm(nnx.Module):
    """Spec: moezoo.core.reference.normalization.rms_norm."""

    def __init__(self, spec: RMSNormSpec, weights: Weights):
        self.spec = spec
        if spec.scale != "none":
            self.scale = weights.parameter("scale")

    def __call__(self, x: jax.Array) -> jax.Array:
        return _rms_norm(x.astype(jnp.float32), self._multiplier(), self.spec.epsilon).astype(x.dtype)

    def _multiplier(self) -> jax.Array | None:
        match self.spec.scale:
            case "learned":
                return self.scale[...]
            case "zero_centred":
                return 1 + self.scale[...]
            case "none":
                return None
            case _:
                assert_never(self.spec.scale)


class LayerNorm(nnx.Module):
    """Spec: moezoo.core.reference.normalization.layer_norm."""

    def __init__(self, spec: LayerNormSpec, weights: Weights):
        self.epsilon = spec.epsilon
        self.scale = weights.parameter("scale")
        self.bias = weights.parameter("bias") if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32, scale = x.astype(jnp.float32), self.scale[...]
        centred = x32 - jnp.mean(x32, axis=_axes(scale), keepdims=True)
        normed = _rms_norm(centred, scale, self.epsilon)
        return (normed if self.bias is None else normed + self.bias[...]).astype(x.dtype)


def norm(spec: NormSpec, weights: Weights) -> RMSNorm | LayerNorm:
    """Spec: moezoo.core.reference.normalization.normalize."""
    match spec:
        case RMSNormSpec():
            return RMSNorm(spec, weights)
        case LayerNormSpec():
            return LayerNorm(spec, weights)
        case _:
            assert_never(spec)


def _rms_norm(x: jax.Array, scale: jax.Array | None, epsilon: float) -> jax.Array:
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=_axes(scale), keepdims=True) + epsilon)
    return normed if scale is None else normed * scale


def _axes(scale: jax.Array | None) -> tuple[int, ...]:
    return (-1,) if scale is None else tuple(range(-scale.ndim, 0))
