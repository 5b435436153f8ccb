"""Position information. Spec: moezoo.core.reference.positions."""

import mlx.core as mx


def rotate(x_BTNH: mx.array, position_T: mx.array, base: float) -> mx.array:
    """Spec: moezoo.core.reference.positions.rotate."""
    half = x_BTNH.shape[-1] // 2
    frequency = base ** (-mx.arange(half, dtype=mx.float32) / half)
    angle = (position_T[:, None].astype(mx.float32) * frequency)[None, :, None, :]
    cosine, sine = mx.cos(angle), mx.sin(angle)
    first, second = mx.split(x_BTNH.astype(mx.float32), 2, axis=-1)
    rotated = mx.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTNH.dtype)
