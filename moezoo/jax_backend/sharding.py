"""Where parameters go, on more than one device. Only here: MLX has one memory."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from moezoo.core.parameters import Parameter, parameter_table
from moezoo.core.safetensors_file import ReadWhenAsked, shapes_of
from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.steps import JaxBackend, JaxModel

Placement = Callable[[Parameter], jax.sharding.Sharding]


class ShardedJaxBackend(JaxBackend):
    """JAX, with each parameter in the sharding that `placement` gives its row of the parameter table.

    A model is loaded straight into it: a parameter at a time is cut on the host, and no device ever holds more than its
    shards. What it computes is the compiler's to divide (GSPMD).
    """

    def __init__(self, placement: Placement):
        super().__init__()
        self._placement = placement

    def build(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> JaxModel:
        """A model with these weights. Raises as `Backend.build`."""
        shardings = {row.name: self._placement(row) for row in parameter_table(spec)}
        return JaxModel(spec, _Placed(weights, shardings))


class _Placed(ReadWhenAsked):
    """Weights as arrays on their devices, one at a time."""

    def __init__(self, weights: Mapping[str, np.ndarray], shardings: Mapping[str, jax.sharding.Sharding]):
        super().__init__(shapes_of(weights))
        self._weights, self._shardings = weights, shardings

    def __getitem__(self, name: str) -> jax.Array:
        return jax.device_put(self._weights[name], self._shardings[name])
