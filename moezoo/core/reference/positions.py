"""Position information."""

import autograd.numpy as np

from moezoo.core.reference import Array


def rotate(x_BTNH: Array, position_T: Array, base: float) -> Array:
    """Rotary position embedding, half-split: feature i and feature i + H/2 of a head form pair i.

    Pair i of position t turns by the angle `t * base^(-2 i / H)`.

    Args:
        x_BTNH: queries or keys (M heads in place of N for keys), H even.
        position_T: int, the position of each token, counted from 0.
        base: the wavelength of the slowest pair is about `2 pi base`.

    Returns:
        [B, T, N, H].

    Source: Su et al. 2021, arXiv 2104.09864, eq. 34.
    Differs: the paper interleaves pairs (2i, 2i + 1); Llama and its kin use halves, which only permutes features.
    """
    half = x_BTNH.shape[-1] // 2
    frequency = base ** (-np.arange(half) / half)
    angle = (position_T[:, None] * frequency)[None, :, None, :]
    first, second = x_BTNH[..., :half], x_BTNH[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)],
        axis=-1,
    )
