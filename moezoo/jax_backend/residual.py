"""The residual stream or streams. Spec: moezoo.core.reference.residual."""

from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import DepthScaledResidualSpec, ResidualSpec, SumResidualSpec
from moezoo.jax_backend.arrays import Weights

Streams = jax.Array
Connection = Any


class Residual(nnx.Module):
    """Spec: moezoo.core.reference.residual, `read` and `write`; of one block."""

    def __init__(self, spec: ResidualSpec, weights: Weights):
        self.spec = spec

    def read(self, streams: Streams, block: int | jax.Array) -> tuple[jax.Array, Connection]:
        """Spec: moezoo.core.reference.residual.read."""
        match self.spec:
            case SumResidualSpec() | DepthScaledResidualSpec():
                return streams, None
            case _:
                assert_never(self.spec)

    def write(self, streams: Streams, connection: Connection, out_BTD: jax.Array, block: int | jax.Array) -> Streams:
        """Spec: moezoo.core.reference.residual.write; in float32, cast back."""
        match self.spec:
            case SumResidualSpec():
                return streams + out_BTD
            case DepthScaledResidualSpec():
                share = 1 / jnp.asarray(block + 2, jnp.float32)
                return (streams * jnp.sqrt(1 - share) + out_BTD * jnp.sqrt(share)).astype(streams.dtype)
            case _:
                assert_never(self.spec)


class FinalResidual(nnx.Module):
    """Spec: moezoo.core.reference.residual.leave."""

    def __init__(self, spec: ResidualSpec, weights: Weights):
        self.spec = spec

    def __call__(self, streams: Streams) -> jax.Array:
        match self.spec:
            case SumResidualSpec() | DepthScaledResidualSpec():
                return streams
            case _:
                assert_never(self.spec)


def enter(spec: ResidualSpec, x_BTD: jax.Array) -> Streams:
    """Spec: moezoo.core.reference.residual.enter."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec():
            return x_BTD
        case _:
            assert_never(spec)
