"""A single MoE layer, compiled, for benchmarks and for users who need no whole model."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.arrays import Weights, named
from moezoo.jax_backend.choice import RoutingContext
from moezoo.jax_backend.moe import MoE
from moezoo.jax_backend.runtime.typed import State


class MoELayer:
    """See moezoo.core.backend.MoELayer. Arrays are JAX's, and each method waits for its result."""

    def __init__(self, spec: ModelSpec, layer: int, weights: Mapping[str, np.ndarray]):
        self._prefix = f"layers.{layer}.moe."
        module = MoE(dict(spec.moes)[layer], Weights(weights, self._prefix, spec.adapter))
        graph, self._parameters, *rest = nnx.split(module, nnx.Param, ...)
        (self._state,) = rest

        def output(parameters: State, state: State, x_BTD: jax.Array, token_BT: jax.Array) -> jax.Array:
            context = RoutingContext(token_P=token_BT.reshape(-1))
            out_BTD: jax.Array = nnx.merge(graph, parameters, state)(x_BTD, context)[0]
            return out_BTD

        def gradients(
            parameters: State, state: State, x_BTD: jax.Array, token_BT: jax.Array, gradient_BTD: jax.Array
        ) -> tuple[State, jax.Array]:
            pull = jax.vjp(lambda parameters, x: output(parameters, state, x, token_BT), parameters, x_BTD)[1]
            of_parameters, of_x_BTD = pull(gradient_BTD)
            return of_parameters, of_x_BTD

        self._forward, self._gradients = jax.jit(output), jax.jit(gradients)

    def array(self, values: np.ndarray) -> jax.Array:
        return jnp.asarray(values)

    def forward(self, x_BTD: jax.Array, token_BT: jax.Array) -> jax.Array:
        out_BTD: jax.Array = jax.block_until_ready(self._forward(self._parameters, self._state, x_BTD, token_BT))
        return out_BTD

    def gradients(
        self, x_BTD: jax.Array, token_BT: jax.Array, gradient_BTD: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        of_parameters, of_x_BTD = jax.block_until_ready(
            self._gradients(self._parameters, self._state, x_BTD, token_BT, gradient_BTD)
        )
        return of_x_BTD, {self._prefix + name: value for name, value in named(of_parameters).items()}
