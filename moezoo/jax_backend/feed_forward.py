"""Dense feed-forward layers. Spec: moezoo.core.reference.feed_forward."""

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import GatedFeedForwardSpec
from moezoo.jax_backend.arrays import Weights


class SwiGLU(nnx.Module):
    """Spec: moezoo.core.reference.feed_forward.swiglu."""

    def __init__(self, spec: GatedFeedForwardSpec, weights: Weights):
        self.w_gate = weights.parameter("w_gate")
        self.w_up = weights.parameter("w_up")
        self.w_down = weights.parameter("w_down")

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jnp.einsum("...D,DF->...F", x, self.w_gate[...].astype(x.dtype))
        up = jnp.einsum("...D,DF->...F", x, self.w_up[...].astype(x.dtype))
        return jnp.einsum("...F,FD->...D", silu_gated(gate, up), self.w_down[...].astype(x.dtype))


def silu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.feed_forward.silu_gated."""
    return jax.nn.silu(gate) * up
