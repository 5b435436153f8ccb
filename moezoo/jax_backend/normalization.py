"""Normalization layers. Spec: moezoo.core.reference.normalization."""

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import NormSpec
from moezoo.jax_backend.arrays import Weights


class RMSNorm(nnx.Module):
    """Spec: moezoo.core.reference.normalization.rms_norm."""

    def __init__(self, spec: NormSpec, weights: Weights):
        self.scale = weights.parameter("scale")
        self.epsilon = spec.epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(x.dtype)
