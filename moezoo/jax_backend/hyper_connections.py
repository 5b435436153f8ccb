"""Hyper-connections: several residual streams. Spec: moezoo.core.reference.hyper_connections."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import GatedStreamsSpec, HyperConnectionsSpec
from moezoo.jax_backend.arrays import Weights


class Connection(NamedTuple):
    """Spec: moezoo.core.reference.hyper_connections.Connection; in float32."""

    write_BTJ: jax.Array
    mix_BTIU: jax.Array | None


class HyperConnection(nnx.Module):
    """Spec: moezoo.core.reference.hyper_connections, `read_streams` and `write_streams`; in float32, cast back."""

    def __init__(self, spec: HyperConnectionsSpec, weights: Weights):
        self.spec = spec
        self.w_read, self.w_write = weights.parameter("w_read"), weights.parameter("w_write")
        self.b_read, self.b_write = weights.parameter("b_read"), weights.parameter("b_write")
        self.read_scale, self.write_scale = weights.parameter("read_scale"), weights.parameter("write_scale")
        if spec.sinkhorn_iterations is not None:
            self.w_mix, self.b_mix = weights.parameter("w_mix"), weights.parameter("b_mix")
            self.mix_scale = weights.parameter("mix_scale")

    def read(self, x_BTJD: jax.Array, block: int | jax.Array) -> tuple[jax.Array, Connection]:
        """Spec: moezoo.core.reference.hyper_connections.read_streams."""
        x, spec = x_BTJD.astype(jnp.float32), self.spec
        maps = [(self.w_read, self.read_scale, self.b_read), (self.w_write, self.write_scale, self.b_write)]
        if spec.sinkhorn_iterations is not None:
            maps.append((self.w_mix, self.mix_scale, self.b_mix))
        read_BTJ, write_BTJ, *logits_BTIU = _logits(x, spec.norm_epsilon, maps)
        write_BTJ = spec.magnitude * jax.nn.sigmoid(write_BTJ) + spec.write_epsilon
        mix_BTIU = None
        if spec.sinkhorn_iterations is not None:
            mix_BTIU = sinkhorn(logits_BTIU[0], spec.sinkhorn_iterations, spec.epsilon)
        return _read(read_BTJ, x, spec.epsilon).astype(x_BTJD.dtype), Connection(write_BTJ, mix_BTIU)

    def write(self, x_BTJD: jax.Array, connection: Connection, out_BTD: jax.Array, block: int | jax.Array) -> jax.Array:
        """Spec: moezoo.core.reference.hyper_connections.write_streams."""
        x = x_BTJD.astype(jnp.float32)
        if connection.mix_BTIU is not None:
            x = jnp.einsum("BTIU,BTID->BTUD", connection.mix_BTIU, x)
        written = connection.write_BTJ[..., None] * out_BTD[:, :, None].astype(jnp.float32)
        return (x + written).astype(x_BTJD.dtype)


class MergedStreams(nnx.Module):
    """Spec: moezoo.core.reference.hyper_connections.merge_streams; in float32, cast back."""

    def __init__(self, spec: HyperConnectionsSpec, weights: Weights):
        self.spec = spec
        if spec.final_read == "weighted":
            self.w_read, self.b_read = weights.parameter("w_read"), weights.parameter("b_read")
            self.read_scale = weights.parameter("read_scale")

    def __call__(self, x_BTJD: jax.Array) -> jax.Array:
        x = x_BTJD.astype(jnp.float32)
        if self.spec.final_read == "mean":
            return jnp.mean(x, axis=2).astype(x_BTJD.dtype)
        (read_BTJ,) = _logits(x, self.spec.norm_epsilon, [(self.w_read, self.read_scale, self.b_read)])
        return _read(read_BTJ, x, self.spec.epsilon).astype(x_BTJD.dtype)


def enter_streams(spec: HyperConnectionsSpec | GatedStreamsSpec, x_BTD: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.hyper_connections.enter_streams."""
    return jnp.repeat(x_BTD[:, :, None], spec.num_streams, axis=2)


def sinkhorn(logits: jax.Array, iterations: int, epsilon: float) -> jax.Array:
    """Spec: moezoo.core.reference.hyper_connections.sinkhorn; a loop that is compiled once."""
    matrix = jax.nn.softmax(logits, axis=-1) + epsilon
    matrix = matrix / (jnp.sum(matrix, axis=-2, keepdims=True) + epsilon)

    def normalized(matrix: jax.Array, _: None) -> tuple[jax.Array, None]:
        matrix = matrix / (jnp.sum(matrix, axis=-1, keepdims=True) + epsilon)
        return matrix / (jnp.sum(matrix, axis=-2, keepdims=True) + epsilon), None

    return jax.lax.scan(normalized, matrix, None, length=iterations - 1)[0]


def _logits(
    x_BTJD: jax.Array,
    epsilon: float,
    maps: Sequence[tuple[nnx.Param[jax.Array], nnx.Param[jax.Array], nnx.Param[jax.Array]]],
) -> list[jax.Array]:
    """Return `scale * (y w) + b` of each w, scale and b, in one product; y are the normalized streams."""
    weights = [w[...].astype(jnp.float32) for w, _, _ in maps]
    width = weights[0].shape[0] * weights[0].shape[1]
    together = jnp.concatenate([w.reshape(width, -1) for w in weights], axis=1)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_BTJD), axis=(-2, -1)) + epsilon)[..., None]
    product = inverse * (x_BTJD.reshape(*x_BTJD.shape[:2], width) @ together)
    found, end = list[jax.Array](), 0
    for w, (_, scale, b) in zip(weights, maps, strict=True):
        start, end = end, end + w.size // width
        own = product[..., start:end].reshape(*product.shape[:2], *w.shape[2:])
        found.append(scale[...].astype(jnp.float32) * own + b[...].astype(jnp.float32))
    return found


def _read(logits_BTJ: jax.Array, x_BTJD: jax.Array, epsilon: float) -> jax.Array:
    return jnp.sum((jax.nn.sigmoid(logits_BTJ) + epsilon)[..., None] * x_BTJD, axis=2)
