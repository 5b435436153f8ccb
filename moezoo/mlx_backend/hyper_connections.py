"""Hyper-connections: several residual streams. Spec: moezoo.core.reference.hyper_connections."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import GatedStreamsSpec, HyperConnectionsSpec
from moezoo.mlx_backend.arrays import Weights


class Connection(NamedTuple):
    """Spec: moezoo.core.reference.hyper_connections.Connection; in float32."""

    write_BTJ: mx.array
    mix_BTIU: mx.array | None


class HyperConnection(nn.Module):
    """Spec: moezoo.core.reference.hyper_connections, `read_streams` and `write_streams`; in float32, cast back."""

    def __init__(self, spec: HyperConnectionsSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.w_read, self.w_write = weights.parameter("w_read"), weights.parameter("w_write")
        self.b_read, self.b_write = weights.parameter("b_read"), weights.parameter("b_write")
        self.read_scale, self.write_scale = weights.parameter("read_scale"), weights.parameter("write_scale")
        if spec.sinkhorn_iterations is not None:
            self.w_mix, self.b_mix = weights.parameter("w_mix"), weights.parameter("b_mix")
            self.mix_scale = weights.parameter("mix_scale")

    def read(self, x_BTJD: mx.array, block: int) -> tuple[mx.array, Connection]:
        """Spec: moezoo.core.reference.hyper_connections.read_streams."""
        x, spec = x_BTJD.astype(mx.float32), self.spec
        maps = [(self.w_read, self.read_scale, self.b_read), (self.w_write, self.write_scale, self.b_write)]
        if spec.sinkhorn_iterations is not None:
            maps.append((self.w_mix, self.mix_scale, self.b_mix))
        read_BTJ, write_BTJ, *logits_BTIU = _logits(x, spec.norm_epsilon, maps)
        write_BTJ = spec.magnitude * mx.sigmoid(write_BTJ) + spec.write_epsilon
        mix_BTIU = None
        if spec.sinkhorn_iterations is not None:
            mix_BTIU = sinkhorn(logits_BTIU[0], spec.sinkhorn_iterations, spec.epsilon)
        return _read(read_BTJ, x, spec.epsilon).astype(x_BTJD.dtype), Connection(write_BTJ, mix_BTIU)

    def write(self, x_BTJD: mx.array, connection: Connection, out_BTD: mx.array, block: int) -> mx.array:
        """Spec: moezoo.core.reference.hyper_connections.write_streams."""
        x = x_BTJD.astype(mx.float32)
        if connection.mix_BTIU is not None:
            x = mx.einsum("BTIU,BTID->BTUD", connection.mix_BTIU, x)
        written = connection.write_BTJ[..., None] * out_BTD[:, :, None].astype(mx.float32)
        return (x + written).astype(x_BTJD.dtype)


class MergedStreams(nn.Module):
    """Spec: moezoo.core.reference.hyper_connections.merge_streams; in float32, cast back."""

    def __init__(self, spec: HyperConnectionsSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        if spec.final_read == "weighted":
            self.w_read, self.b_read = weights.parameter("w_read"), weights.parameter("b_read")
            self.read_scale = weights.parameter("read_scale")

    def __call__(self, x_BTJD: mx.array) -> mx.array:
        x = x_BTJD.astype(mx.float32)
        if self.spec.final_read == "mean":
            return mx.mean(x, axis=2).astype(x_BTJD.dtype)
        (read_BTJ,) = _logits(x, self.spec.norm_epsilon, [(self.w_read, self.read_scale, self.b_read)])
        return _read(read_BTJ, x, self.spec.epsilon).astype(x_BTJD.dtype)


def enter_streams(spec: HyperConnectionsSpec | GatedStreamsSpec, x_BTD: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.hyper_connections.enter_streams."""
    return mx.repeat(x_BTD[:, :, None], spec.num_streams, axis=2)


def sinkhorn(logits: mx.array, iterations: int, epsilon: float) -> mx.array:
    """Spec: moezoo.core.reference.hyper_connections.sinkhorn."""
    matrix = mx.softmax(logits, axis=-1) + epsilon
    matrix = matrix / (mx.sum(matrix, axis=-2, keepdims=True) + epsilon)
    for _ in range(iterations - 1):
        matrix = matrix / (mx.sum(matrix, axis=-1, keepdims=True) + epsilon)
        matrix = matrix / (mx.sum(matrix, axis=-2, keepdims=True) + epsilon)
    return matrix


def _logits(x_BTJD: mx.array, epsilon: float, maps: Sequence[tuple[mx.array, mx.array, mx.array]]) -> list[mx.array]:
    """Return `scale * (y w) + b` of each w, scale and b, in one product; y are the normalized streams."""
    weights = [w.astype(mx.float32) for w, _, _ in maps]
    width = weights[0].shape[0] * weights[0].shape[1]
    together = mx.concatenate([w.reshape(width, -1) for w in weights], axis=1)
    inverse = mx.rsqrt(mx.mean(mx.square(x_BTJD), axis=(-2, -1)) + epsilon)[..., None]
    product = inverse * (x_BTJD.reshape(*x_BTJD.shape[:2], width) @ together)
    found, end = list[mx.array](), 0
    for w, (_, scale, b) in zip(weights, maps, strict=True):
        start, end = end, end + w.size // width
        own = product[..., start:end].reshape(*product.shape[:2], *w.shape[2:])
        found.append(scale.astype(mx.float32) * own + b.astype(mx.float32))
    return found


def _read(logits_BTJ: mx.array, x_BTJD: mx.array, epsilon: float) -> mx.array:
    return mx.sum((mx.sigmoid(logits_BTJ) + epsilon)[..., None] * x_BTJD, axis=2)
