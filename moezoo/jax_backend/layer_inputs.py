"""Per-layer inputs, beside the residual stream. Spec: moezoo.core.reference.layer_inputs."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import LayerInputsSpec, NormSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.feed_forward import activate
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.quantization import take


class LayerInputs(nnx.Module):
    """Spec: moezoo.core.reference.layer_inputs.layer_inputs; adds in float32."""

    def __init__(self, spec: LayerInputsSpec, norm_spec: NormSpec, weights: Weights):
        self.spec = spec
        self.weight = weights.parameter("weight")
        self.w_context = weights.parameter("w_context")
        self.norm = norm(norm_spec, weights.inside("norm"))

    def __call__(self, tokens_BT: jax.Array, x_BTD: jax.Array) -> jax.Array:
        context = projection.einsum("BTD,DLZ->BTLZ", x_BTD, self.w_context[...].astype(x_BTD.dtype))
        context = self.norm(context.astype(jnp.float32) / math.sqrt(x_BTD.shape[-1]))
        own = math.sqrt(self.spec.dim) * take(self.weight[...], tokens_BT).astype(jnp.float32)
        return ((context + own) / math.sqrt(2)).astype(x_BTD.dtype)


class LayerInput(nnx.Module):
    """Spec: moezoo.core.reference.layer_inputs.layer_input."""

    def __init__(self, spec: LayerInputsSpec, norm_spec: NormSpec, weights: Weights):
        self.spec = spec
        self.w_gate = weights.parameter("w_gate")
        self.w_output = weights.parameter("w_output")
        self.norm = norm(norm_spec, weights.inside("norm"))

    def __call__(self, x_BTD: jax.Array, input_BTZ: jax.Array) -> jax.Array:
        gate = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_gate[...].astype(x_BTD.dtype))
        gated = activate(self.spec.gated, gate, input_BTZ)
        return self.norm(projection.einsum("BTZ,ZD->BTD", gated, self.w_output[...].astype(x_BTD.dtype)))
