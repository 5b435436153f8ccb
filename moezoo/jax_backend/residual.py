"""The residual stream or streams. Spec: moezoo.core.reference.residual."""

from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import DepthScaledResidualSpec, HyperConnectionsSpec, ResidualSpec, SumResidualSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.hyper_connections import HyperConnection, MergedStreams, enter_streams

Streams = jax.Array
Connection = Any


class OneStream(nnx.Module):
    """Spec: moezoo.core.reference.residual, `read` and `write` of one stream."""

    def __init__(self, spec: SumResidualSpec | DepthScaledResidualSpec):
        self.spec = spec

    def read(self, x_BTD: jax.Array, block: int | jax.Array) -> tuple[jax.Array, Connection]:
        """Spec: moezoo.core.reference.residual.read."""
        return x_BTD, None

    def write(self, x_BTD: jax.Array, connection: Connection, out_BTD: jax.Array, block: int | jax.Array) -> jax.Array:
        """Spec: moezoo.core.reference.residual.write; in float32, cast back."""
        match self.spec:
            case SumResidualSpec():
                return x_BTD + out_BTD
            case DepthScaledResidualSpec():
                share = 1 / jnp.asarray(block + 2, jnp.float32)
                return (x_BTD * jnp.sqrt(1 - share) + out_BTD * jnp.sqrt(share)).astype(x_BTD.dtype)
            case _:
                assert_never(self.spec)


Residual = OneStream | HyperConnection


def residual(spec: ResidualSpec, weights: Weights) -> Residual:
    """Spec: moezoo.core.reference.residual, `read` and `write`; of one block, whose own weights these are."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec():
            return OneStream(spec)
        case HyperConnectionsSpec():
            return HyperConnection(spec, weights)
        case _:
            assert_never(spec)


def final_residual(spec: ResidualSpec, weights: Weights) -> MergedStreams | None:
    """Spec: moezoo.core.reference.residual.leave; None: the stream as it is."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec():
            return None
        case HyperConnectionsSpec():
            return MergedStreams(spec, weights)
        case _:
            assert_never(spec)


def enter(spec: ResidualSpec, x_BTD: jax.Array) -> Streams:
    """Spec: moezoo.core.reference.residual.enter."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec():
            return x_BTD
        case HyperConnectionsSpec():
            return enter_streams(spec, x_BTD)
        case _:
            assert_never(spec)
