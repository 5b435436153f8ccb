"""RMS norm: MLX's own, or on x86 on all cores, and for few rows in half as many operations."""

import functools

import mlx.core as mx

from moezoo.mlx_backend.kernels.x86 import is_x86_cpu, pays
from moezoo.mlx_backend.kernels.x86 import normalization as x86


def rms_norm(x: mx.array, scale: mx.array | None, epsilon: float) -> mx.array:
    """Return `mx.fast.rms_norm`, which is a dozen operations on a CPU."""
    if pays(x.size):
        return x86.rms_norm(x, scale, epsilon)
    if not is_x86_cpu():
        return mx.fast.rms_norm(x, scale, epsilon)
    epsilon_11, mean_D1 = _constants(epsilon, x.shape[-1], x.ndim)
    normed = x * mx.rsqrt(mx.addmm(epsilon_11, mx.square(x), mean_D1))
    return normed if scale is None else normed * scale


@functools.cache
def _constants(epsilon: float, width: int, ndim: int) -> tuple[mx.array, mx.array]:
    """Return epsilon [..., 1, 1], and the matrix [..., D, 1] whose product with rows is their mean."""
    ones = (1,) * (ndim - 2)
    return mx.full((*ones, 1, 1), epsilon, mx.float32), mx.full((*ones, width, 1), 1 / width, mx.float32)
