"""Dense feed-forward layers. Spec: moezoo.core.reference.feed_forward."""

from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import (
    ClampedSwiGLUSpec,
    FeedForwardSpec,
    GatedFeedForwardSpec,
    PlainFeedForwardSpec,
    SoftcappedSwiGLUSpec,
)
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kernels import projection


class FeedForward(nnx.Module):
    """Spec: moezoo.core.reference.feed_forward.feed_forward."""

    def __init__(self, spec: FeedForwardSpec, weights: Weights):
        self.spec = spec
        if not isinstance(spec, PlainFeedForwardSpec):
            self.w_gate = weights.parameter("w_gate")
        self.w_up = weights.parameter("w_up")
        self.w_down = weights.parameter("w_down")
        if spec.bias:
            if not isinstance(spec, PlainFeedForwardSpec):
                self.b_gate = weights.parameter("b_gate")
            self.b_up = weights.parameter("b_up")
            self.b_down = weights.parameter("b_down")

    def __call__(self, x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        spec, dtype = self.spec, x.dtype
        gate = None
        if not isinstance(spec, PlainFeedForwardSpec):
            gate = projection.einsum("...D,DF->...F", x, self.w_gate[...].astype(dtype))
            gate = gate + self.b_gate[...].astype(dtype) if spec.bias else gate
        up = projection.einsum("...D,DF->...F", x, self.w_up[...].astype(dtype))
        up = up + self.b_up[...].astype(dtype) if spec.bias else up
        activated = activate(spec, gate, up)
        activated = activated if weight is None else (activated * weight).astype(dtype)
        out = projection.einsum("...F,FD->...D", activated, self.w_down[...].astype(dtype))
        return out + self.b_down[...].astype(dtype) if spec.bias else out


def activate(spec: FeedForwardSpec, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.feed_forward.activate."""
    match spec:
        case GatedFeedForwardSpec(limit=limit):
            assert gate is not None
            match spec.kind:
                case "swiglu":
                    factor = jax.nn.silu(gate)
                case "geglu":
                    factor = jax.nn.gelu(gate, approximate=True)
                case "exact_geglu":
                    factor = jax.nn.gelu(gate, approximate=False)
                case "reglu":
                    factor = jax.nn.relu(gate)
                case "relu_squared_glu":
                    factor = jnp.square(jax.nn.relu(gate))
                case _:
                    assert_never(spec.kind)
            return factor * up if limit is None else jnp.minimum(factor, limit) * jnp.clip(up, -limit, limit)
        case ClampedSwiGLUSpec():
            assert gate is not None
            gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
            return gate * jax.nn.sigmoid(spec.alpha * gate) * (up + spec.up_offset)
        case SoftcappedSwiGLUSpec(gate_softcap=gate_cap, up_softcap=up_cap):
            assert gate is not None
            return gate_cap * jnp.tanh(gate / gate_cap) * jax.nn.sigmoid(gate) * up_cap * jnp.tanh(up / up_cap)
        case PlainFeedForwardSpec():
            match spec.kind:
                case "relu":
                    return jax.nn.relu(up)
                case "gelu":
                    return jax.nn.gelu(up, approximate=True)
                case "silu":
                    return jax.nn.silu(up)
                case "relu_squared":
                    return jnp.square(jax.nn.relu(up))
                case _:
                    assert_never(spec.kind)
        case _:
            assert_never(spec)
