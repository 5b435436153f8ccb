"""The residual stream or streams. Spec: moezoo.core.reference.residual."""

import math
from typing import Any, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import (
    BlockAttentionResidualSpec,
    DepthScaledResidualSpec,
    GatedStreamsSpec,
    HyperConnectionsSpec,
    NormSpec,
    ResidualSpec,
    ScaledResidualSpec,
    SumResidualSpec,
)
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.gated_streams import GatedRead, GatedStreams
from moezoo.mlx_backend.hyper_connections import HyperConnection, MergedStreams, enter_streams

Streams = mx.array
Connection = Any


class OneStream(nn.Module):
    """Spec: moezoo.core.reference.residual, `read` and `write` of one stream."""

    def __init__(self, spec: SumResidualSpec | DepthScaledResidualSpec):
        super().__init__()
        self.spec = spec

    def read(self, x_BTD: mx.array, block: int) -> tuple[mx.array, Connection]:
        """Spec: moezoo.core.reference.residual.read."""
        return x_BTD, None

    def write(self, x_BTD: mx.array, connection: Connection, out_BTD: mx.array, block: int) -> mx.array:
        """Spec: moezoo.core.reference.residual.write; in float32, cast back."""
        match self.spec:
            case SumResidualSpec():
                return x_BTD + out_BTD
            case DepthScaledResidualSpec():
                share = 1 / mx.array(block + 2, mx.float32)
                return (x_BTD * mx.sqrt(1 - share) + out_BTD * mx.sqrt(share)).astype(x_BTD.dtype)
            case _:
                assert_never(self.spec)


class ScaledStream(nn.Module):
    """Spec: moezoo.core.reference.residual, `read` and `write` of one stream with scales and biases; in float32."""

    def __init__(self, spec: ScaledResidualSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.stream_scale = weights.parameter("stream_scale")
        if spec.terms == "both":
            self.stream_bias = weights.parameter("stream_bias")
            self.block_scale, self.block_bias = weights.parameter("block_scale"), weights.parameter("block_bias")

    def read(self, x_BTD: mx.array, block: int) -> tuple[mx.array, Connection]:
        """Spec: moezoo.core.reference.residual.read."""
        return x_BTD, None

    def write(self, x_BTD: mx.array, connection: Connection, out_BTD: mx.array, block: int) -> mx.array:
        """Spec: moezoo.core.reference.residual.write; cast back."""
        if self.spec.terms == "stream":
            return (x_BTD * self.stream_scale.astype(mx.float32) + out_BTD).astype(x_BTD.dtype)
        stream_BTD = _scaled(x_BTD, self.stream_scale, self.stream_bias)
        return (stream_BTD + _scaled(out_BTD, self.block_scale, self.block_bias)).astype(x_BTD.dtype)


class ScaledEmbedding(nn.Module):
    """Spec: moezoo.core.reference.residual.enter, of one stream with scales and biases; in float32, cast back."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.stream_scale, self.stream_bias = weights.parameter("stream_scale"), weights.parameter("stream_bias")

    def __call__(self, x_BTD: mx.array) -> mx.array:
        return _scaled(x_BTD, self.stream_scale, self.stream_bias).astype(x_BTD.dtype)


class DepthAttention(nn.Module):
    """Spec: moezoo.core.reference.residual.attend_blocks; in float32, cast back."""

    def __init__(self, spec: BlockAttentionResidualSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.attends = weights.has("query")
        if self.attends:
            self.query = weights.parameter("query")

    def __call__(self, streams_BTJD: mx.array) -> mx.array:
        """Return what a reader sees of all sums; of the embeddings alone, themselves."""
        if not self.attends:
            return streams_BTJD[:, :, 0]
        x_BTJD, query_D = streams_BTJD.astype(mx.float32), self.query.astype(mx.float32)
        square_BTJ1 = mx.mean(mx.square(x_BTJD), axis=-1, keepdims=True)
        normed_BTJD = x_BTJD / mx.sqrt(square_BTJ1 + self.spec.norm_epsilon)
        score_BTJ = mx.einsum("BTJD,D->BTJ", normed_BTJD, query_D) / math.sqrt(len(query_D))
        weight_BTJ = mx.softmax(score_BTJ, axis=-1)
        return mx.einsum("BTJ,BTJD->BTD", weight_BTJ, normed_BTJD).astype(streams_BTJD.dtype)

    def read(self, streams_BTJD: mx.array, block: int) -> tuple[mx.array, Connection]:
        """Spec: moezoo.core.reference.residual.read."""
        return self(streams_BTJD), None

    def write(self, streams_BTJD: mx.array, connection: Connection, out_BTD: mx.array, block: int) -> mx.array:
        """Spec: moezoo.core.reference.residual.write."""
        assert isinstance(block, int)
        kept, running = streams_BTJD, out_BTD
        if not self.spec.begins(block):
            kept, running = streams_BTJD[:, :, :-1], streams_BTJD[:, :, -1] + out_BTD
        return mx.concatenate([kept, running[:, :, None]], axis=2)


Residual = DepthAttention | OneStream | ScaledStream | HyperConnection | GatedStreams


def residual(spec: ResidualSpec, norm: NormSpec, weights: Weights) -> Residual:
    """Spec: moezoo.core.reference.residual, `read` and `write`; of one block, whose own weights these are."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec():
            return OneStream(spec)
        case ScaledResidualSpec():
            return ScaledStream(spec, weights)
        case HyperConnectionsSpec():
            return HyperConnection(spec, weights)
        case GatedStreamsSpec():
            return GatedStreams(norm, weights)
        case BlockAttentionResidualSpec():
            return DepthAttention(spec, weights)
        case _:
            assert_never(spec)


def first_residual(spec: ResidualSpec, weights: Weights) -> ScaledEmbedding | None:
    """Spec: moezoo.core.reference.residual.enter; what is trained of it, None: nothing."""
    return ScaledEmbedding(weights) if isinstance(spec, ScaledResidualSpec) and spec.terms == "both" else None


def final_residual(
    spec: ResidualSpec, norm: NormSpec, weights: Weights
) -> MergedStreams | GatedRead | DepthAttention | None:
    """Spec: moezoo.core.reference.residual.leave; None: the stream as it is."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec() | ScaledResidualSpec():
            return None
        case HyperConnectionsSpec():
            return MergedStreams(spec, weights)
        case GatedStreamsSpec():
            return GatedRead(norm, weights)
        case BlockAttentionResidualSpec():
            return DepthAttention(spec, weights)
        case _:
            assert_never(spec)


def enter(spec: ResidualSpec, x_BTD: mx.array) -> Streams:
    """Spec: moezoo.core.reference.residual.enter."""
    match spec:
        case SumResidualSpec() | DepthScaledResidualSpec() | ScaledResidualSpec():
            return x_BTD
        case HyperConnectionsSpec() | GatedStreamsSpec():
            return enter_streams(spec, x_BTD)
        case BlockAttentionResidualSpec():
            return x_BTD[:, :, None]
        case _:
            assert_never(spec)


def _scaled(x_BTD: mx.array, scale_D: mx.array, bias_D: mx.array) -> mx.array:
    return (x_BTD.astype(mx.float32) + bias_D.astype(mx.float32)) * scale_D.astype(mx.float32)
