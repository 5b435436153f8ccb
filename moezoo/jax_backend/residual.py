"""The residual stream or streams. Spec: moezoo.core.reference.residual."""

import math
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import nnx

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
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.gated_streams import GatedRead, GatedStreams
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


class ScaledStream(nnx.Module):
    """Spec: moezoo.core.reference.residual, `read` and `write` of one stream with scales and biases; in float32."""

    def __init__(self, spec: ScaledResidualSpec, weights: Weights):
        self.spec = spec
        self.stream_scale = weights.parameter("stream_scale")
        if spec.terms == "both":
            self.stream_bias = weights.parameter("stream_bias")
            self.block_scale, self.block_bias = weights.parameter("block_scale"), weights.parameter("block_bias")

    def read(self, x_BTD: jax.Array, block: int | jax.Array) -> tuple[jax.Array, Connection]:
        """Spec: moezoo.core.reference.residual.read."""
        return x_BTD, None

    def write(self, x_BTD: jax.Array, connection: Connection, out_BTD: jax.Array, block: int | jax.Array) -> jax.Array:
        """Spec: moezoo.core.reference.residual.write; cast back."""
        if self.spec.terms == "stream":
            return (x_BTD * self.stream_scale[...].astype(jnp.float32) + out_BTD).astype(x_BTD.dtype)
        stream_BTD = _scaled(x_BTD, self.stream_scale, self.stream_bias)
        return (stream_BTD + _scaled(out_BTD, self.block_scale, self.block_bias)).astype(x_BTD.dtype)


class ScaledEmbedding(nnx.Module):
    """Spec: moezoo.core.reference.residual.enter, of one stream with scales and biases; in float32, cast back."""

    def __init__(self, weights: Weights):
        self.stream_scale, self.stream_bias = weights.parameter("stream_scale"), weights.parameter("stream_bias")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return _scaled(x_BTD, self.stream_scale, self.stream_bias).astype(x_BTD.dtype)


class DepthAttention(nnx.Module):
    """Spec: moezoo.core.reference.residual.attend_blocks; in float32, cast back."""

    def __init__(self, spec: BlockAttentionResidualSpec, weights: Weights):
        self.spec = spec
        self.attends = weights.has("query")
        if self.attends:
            self.query = weights.parameter("query")

    def __call__(self, streams_BTJD: jax.Array) -> jax.Array:
        """Return what a reader sees of all sums; of the embeddings alone, themselves."""
        if not self.attends:
            return streams_BTJD[:, :, 0]
        x_BTJD, query_D = streams_BTJD.astype(jnp.float32), self.query[...].astype(jnp.float32)
        square_BTJ1 = jnp.mean(jnp.square(x_BTJD), axis=-1, keepdims=True)
        normed_BTJD = x_BTJD / jnp.sqrt(square_BTJ1 + self.spec.norm_epsilon)
        score_BTJ = jnp.einsum("BTJD,D->BTJ", normed_BTJD, query_D) / math.sqrt(len(query_D))
        weight_BTJ = jax.nn.softmax(score_BTJ, axis=-1)
        return jnp.einsum("BTJ,BTJD->BTD", weight_BTJ, normed_BTJD).astype(streams_BTJD.dtype)

    def read(self, streams_BTJD: jax.Array, block: int | jax.Array) -> tuple[jax.Array, Connection]:
        """Spec: moezoo.core.reference.residual.read."""
        return self(streams_BTJD), None

    def write(
        self, streams_BTJD: jax.Array, connection: Connection, out_BTD: jax.Array, block: int | jax.Array
    ) -> jax.Array:
        """Spec: moezoo.core.reference.residual.write."""
        kept, running = streams_BTJD, out_BTD
        if not isinstance(block, int) or not self.spec.begins(block):  # scanned layers begin no sum
            kept, running = streams_BTJD[:, :, :-1], streams_BTJD[:, :, -1] + out_BTD
        return jnp.concatenate([kept, running[:, :, None]], axis=2)


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


def enter(spec: ResidualSpec, x_BTD: jax.Array) -> Streams:
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


def _scaled(x_BTD: jax.Array, scale_D: nnx.Param[jax.Array], bias_D: nnx.Param[jax.Array]) -> jax.Array:
    return (x_BTD.astype(jnp.float32) + bias_D[...].astype(jnp.float32)) * scale_D[...].astype(jnp.float32)
