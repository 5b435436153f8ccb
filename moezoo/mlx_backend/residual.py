"""The residual stream or streams. Spec: moezoo.core.reference.residual."""

from typing import Any, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import DepthScaledResidualSpec, ResidualSpec, SumResidualSpec
from moezoo.mlx_backend.arrays import Weights

Streams = mx.array
Connection = Any


class Residual(nn.Module):
    """Spec: moezoo.core.reference.residual, `read` and `write`; of one block."""

    def __init__(self, spec: ResidualSpec, weights: Weights):
        super().__init__()
        self.spec = spec

    def read(self, streams: Streams, block: int) -> tuple[mx.array, Connection]:
        """Spec: moezoo.core.reference.residual.read."""
        match self.spec:
            case SumResidualSpec() | DepthScaledResidualSpec():
                return streams, None
            case _:
                assert_never(self.spec)

    def write(self, streams: Streams, connection: Connection, out_BTD: mx.array, block: int) -> Streams:
        """Spec: moezoo.core.reference.residual.write; in float32, cast back."""
        match self.spec:
            case SumResidualSpec():
                return streams + out_BTD
            case DepthScaledResidualSpec():
                share = 1 / mx.array(block + 2, mx.float32)
                return (streams * mx.sqrt(1 - share) + out_BTD * mx.sqrt(share)).astype(streams.dtype)
            case _:
                assert_never(self.spec)


class FinalResidual(nn.Module):
    """Spec: moezoo.core.reference.residual.leave."""

    def __init__(self, spec: ResidualSpec, weights: Weights):
        super().__init__()
        self.spec = spec

    def __call__(self, streams: Streams) -> mx.array:
        match self.spec:
            case SumResidualSpec() | DepthScaledResidualSpec():
                return streams
            case _:
                assert_never(self.spec)


def enter(spec: ResidualSpec, x_BTD: mx.array) -> Streams:
    """Spec: moezoo.core.reference.residual.enter."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec():
            return x_BTD
        case _:
            assert_never(spec)
