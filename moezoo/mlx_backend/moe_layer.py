"""A single MoE layer, for benchmarks and for users who need no whole model."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec
from moezoo.mlx_backend.arrays import Weights, canonical_name
from moezoo.mlx_backend.choice import RoutingContext
from moezoo.mlx_backend.moe import MoE
from moezoo.mlx_backend.runtime.typed import flatten


class MoELayer:
    """See moezoo.core.backend.MoELayer. Arrays are MLX's, and each method waits for its result."""

    def __init__(self, spec: ModelSpec, layer: int, weights: Mapping[str, np.ndarray]):
        self._prefix = f"layers.{layer}.moe."
        self._module = MoE(dict(spec.moes)[layer], Weights(weights, self._prefix, spec.adapter))
        trained = {row.name.removeprefix(self._prefix) for row in parameter_table(spec) if row.trained}
        paths = dict(flatten(self._module.parameters()))
        self._parameters = {path: value for path, value in paths.items() if canonical_name(path) in trained}
        mx.eval(self._module.parameters())

    def array(self, values: np.ndarray) -> mx.array:
        return mx.array(values)

    def forward(self, x_BTD: mx.array, token_BT: mx.array) -> mx.array:
        out_BTD = self._module(x_BTD, RoutingContext(token_P=token_BT.reshape(-1)))[0]
        mx.eval(out_BTD)
        return out_BTD

    def gradients(
        self, x_BTD: mx.array, token_BT: mx.array, gradient_BTD: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        def output(x_BTD: mx.array, *values: mx.array) -> list[mx.array]:
            self._module.update(tree_unflatten(list(zip(self._parameters, values, strict=True))))
            return [self._module(x_BTD, RoutingContext(token_P=token_BT.reshape(-1)))[0]]

        _, (of_x_BTD, *of_parameters) = mx.vjp(output, [x_BTD, *self._parameters.values()], [gradient_BTD])
        mx.eval(of_x_BTD, of_parameters)
        self._module.update(tree_unflatten(list(self._parameters.items())))
        return of_x_BTD, {
            self._prefix + canonical_name(path): value
            for path, value in zip(self._parameters, of_parameters, strict=True)
        }
