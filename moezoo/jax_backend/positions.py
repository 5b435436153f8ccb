"""Position information. Spec: moezoo.core.reference.positions."""

import jax
import jax.numpy as jnp


def rotate(x_BTNH: jax.Array, position_T: jax.Array, base: float) -> jax.Array:
    """Spec: moezoo.core.reference.positions.rotate."""
    half = x_BTNH.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (position_T[:, None].astype(jnp.float32) * frequency)[None, :, None, :]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_BTNH.dtype)
