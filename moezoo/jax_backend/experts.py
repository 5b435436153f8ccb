"""Routed experts. Spec: moezoo.core.reference.experts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import ExpertsSpec, PlainFeedForwardSpec
from moezoo.jax_backend.adapter import held
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.feed_forward import activate
from moezoo.jax_backend.kernels.expert_blocks import expert_kernel, with_factors
from moezoo.jax_backend.kernels.grouped_product import group_rows, grouped_product

ExpertsCall = Callable[[jax.Array, jax.Array], jax.Array]
"""Experts as a function: rows [R, D] sorted by expert, of which each has size_E -> outputs [R, D]."""


class Experts(nnx.Module):
    """Spec: moezoo.core.reference.experts.experts."""

    def __init__(self, spec: ExpertsSpec, weights: Weights):
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

    def __call__(self, x_RD: jax.Array, size_E: jax.Array) -> jax.Array:
        spec, dtype = self.spec, x_RD.dtype
        names = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        parameters = with_factors({name: held(getattr(self, name)) for name in names})
        kernel = expert_kernel(x_RD, parameters)
        if kernel is not None:
            return kernel(spec, x_RD, parameters, size_E)
        groups = group_rows(size_E, x_RD.shape[0])

        def linear(x_RD: jax.Array, name: str) -> jax.Array:
            product = grouped_product(x_RD, parameters[f"w_{name}"], groups)
            if f"w_{name}.lora_a" in parameters:
                low_RK = grouped_product(x_RD, parameters[f"w_{name}.lora_a"], groups)
                product = product + grouped_product(low_RK, parameters[f"w_{name}.lora_b"], groups)
            if not spec.bias:
                return product
            # In float32, so that the sum over an expert's rows which is the bias's gradient keeps its digits.
            return product + parameters[f"b_{name}"].astype(jnp.float32)[groups.expert_R].astype(dtype)

        gate = None if isinstance(spec, PlainFeedForwardSpec) else linear(x_RD, "gate")
        return linear(activate(spec, gate, linear(x_RD, "up")), "down")
