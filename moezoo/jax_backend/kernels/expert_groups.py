"""Feed-forward of all experts at once, where OpenBLAS multiplies exactly the rows of each."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.core.spec import ExpertsSpec
from moezoo.jax_backend.feed_forward import activate
from moezoo.jax_backend.kernels.grouped_product import group_rows
from moezoo.jax_backend.kernels.openblas import grouped_gradients, grouped_rows, grouped_rows_transposed

Arrays = dict[str, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_experts(spec: ExpertsSpec, x_RD: jax.Array, parameters: Arrays, size_E: jax.Array) -> jax.Array:
    """Return the output [R, D] of float32 rows that are sorted by expert. All arrays are float32."""
    return _forward(spec, x_RD, parameters, size_E)[0]


def _forward(
    spec: ExpertsSpec, x_RD: jax.Array, parameters: Arrays, size_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Arrays, jax.Array, Arrays]]:
    """Return the output [R, D] and the residuals for the backward pass: inputs, and pre-activations by name."""
    expert_R = group_rows(size_E, x_RD.shape[0]).expert_R

    def linear(rows: jax.Array, name: str) -> jax.Array:
        product = grouped_rows(size_E, rows, parameters[f"w_{name}"])
        if f"w_{name}.lora_a" in parameters:
            low = grouped_rows(size_E, rows, parameters[f"w_{name}.lora_a"])
            product = product + grouped_rows(size_E, low, parameters[f"w_{name}.lora_b"])
        return product + parameters[f"b_{name}"][expert_R] if spec.bias else product

    pre_activations = {name: linear(x_RD, name) for name in ("gate", "up") if f"w_{name}" in parameters}
    out = linear(activate(spec, pre_activations.get("gate"), pre_activations["up"]), "down")
    return out, (x_RD, parameters, size_E, pre_activations)


def _backward(
    spec: ExpertsSpec, saved: tuple[jax.Array, Arrays, jax.Array, Arrays], gradient_RD: jax.Array
) -> tuple[jax.Array, Arrays, None]:
    # Behind the barrier, XLA computes the activation again; otherwise it would keep parts of it since the forward pass.
    x_RD, parameters, size_E, pre_activations = lax.optimization_barrier(saved)
    hidden_RF, pull = jax.vjp(lambda own: activate(spec, own.get("gate"), own["up"]), pre_activations)
    low = _gradients_of_low(parameters, size_E, {"down": gradient_RD})
    (gradients,) = pull(_of_rows(parameters, size_E, {"down": gradient_RD}, low))
    operands = {name: (x_RD, gradient) for name, gradient in gradients.items()} | {"down": (hidden_RF, gradient_RD)}
    found = {f"w_{name}": grouped_gradients(size_E, *pair) for name, pair in operands.items()}
    low |= _gradients_of_low(parameters, size_E, gradients)
    for name, of_low in low.items():
        left, right = operands[name]
        found[f"w_{name}.lora_a"] = grouped_gradients(size_E, left, of_low)
        left_low = grouped_rows(size_E, left, parameters[f"w_{name}.lora_a"])
        found[f"w_{name}.lora_b"] = grouped_gradients(size_E, left_low, right)
    if spec.bias:
        ones_R1 = jnp.ones((x_RD.shape[0], 1))
        found |= {f"b_{name}": grouped_gradients(size_E, ones_R1, right)[:, 0] for name, (_, right) in operands.items()}
    return _of_rows(parameters, size_E, gradients, low), found, None


def _gradients_of_low(parameters: Arrays, size_E: jax.Array, gradients: Arrays) -> Arrays:
    """Return the gradients [R, r] of the rows times the first factors of adapters, by the name of their matrix."""
    return {
        name: grouped_rows_transposed(size_E, (gradient, parameters[f"w_{name}.lora_b"]))
        for name, gradient in gradients.items()
        if f"w_{name}.lora_b" in parameters
    }


def _of_rows(parameters: Arrays, size_E: jax.Array, gradients: Arrays, low: Arrays) -> jax.Array:
    """Return the gradient of the rows, from those of their products by the name of the matrix."""
    pairs = [(gradient, parameters[f"w_{name}"]) for name, gradient in gradients.items()]
    pairs += [(low[name], parameters[f"w_{name}.lora_a"]) for name in gradients if name in low]
    return grouped_rows_transposed(size_E, *pairs)


grouped_experts.defvjp(_forward, _backward)
