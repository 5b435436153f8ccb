"""Position encodings. Spec: moezoo.core.reference.positions."""

import functools
from typing import assert_never

import mlx.core as mx
import numpy as np
from mlx import nn

from moezoo.core.reference.positions import frequencies, score_multiplier, sinusoidal_frequencies
from moezoo.core.spec import EmbeddingPositionSpec, LearnedPositionsSpec, RoPESpec, SinusoidalPositionsSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels.rotation import turning_matrix, turns_by_matrix
from moezoo.mlx_backend.quantization import take

__all__ = ["EmbeddingPosition", "rotate", "score_multiplier"]  # score_multiplier is a plain number, shared with core


def rotate(spec: RoPESpec, x_BTNH: mx.array, position_T: mx.array | range) -> mx.array:
    """Spec: moezoo.core.reference.positions.rotate; positions [T], or [B, T] where rows start at different slots.

    A range is for positions that are known to Python.
    """
    if isinstance(position_T, range) and turns_by_matrix(len(position_T)):
        turned_BTNH = x_BTNH.astype(mx.float32) @ _matrix(spec, x_BTNH.shape[-1], position_T.start)
        return turned_BTNH.astype(x_BTNH.dtype)
    if isinstance(position_T, range):
        cosine, sine = _cosine_and_sine(spec, x_BTNH.shape[-1], position_T)
    else:
        frequency, attention_factor = frequencies(spec, x_BTNH.shape[-1])
        angle = _angle(position_T, frequency)[..., None, :]
        cosine, sine = attention_factor * mx.cos(angle), attention_factor * mx.sin(angle)
    rotated_dim = 2 * cosine.shape[-1]

    def turn(first: mx.array, second: mx.array) -> list[mx.array]:
        return [first * cosine - second * sine, second * cosine + first * sine]

    x = x_BTNH[..., :rotated_dim].astype(mx.float32)
    match spec.layout:
        case "half_split":
            out = mx.concatenate(turn(*mx.split(x, 2, axis=-1)), axis=-1)
        case "interleaved":
            pairs = x.reshape(*x.shape[:-1], -1, 2)
            out = mx.stack(turn(pairs[..., 0], pairs[..., 1]), axis=-1).reshape(x.shape)
        case _:
            assert_never(spec.layout)
    out = out.astype(x_BTNH.dtype)
    return out if rotated_dim == x_BTNH.shape[-1] else mx.concatenate([out, x_BTNH[..., rotated_dim:]], axis=-1)


@functools.lru_cache(maxsize=64)
def _cosine_and_sine(spec: RoPESpec, head_dim: int, position_T: range) -> tuple[mx.array, mx.array]:
    """Return cosine and sine [T, 1, H / 2] in float32, computed once for all layers, queries, keys and steps.

    In decoding, the number of operations matters for speed, not their size.
    """
    frequency, attention_factor = frequencies(spec, head_dim)
    angle = np.array(position_T, np.float32)[:, None, None] * frequency.astype(np.float32)
    factor = np.float32(attention_factor)
    return mx.array(factor * np.cos(angle)), mx.array(factor * np.sin(angle))


@functools.lru_cache(maxsize=64)
def _matrix(spec: RoPESpec, head_dim: int, position: int) -> mx.array:
    return mx.array(turning_matrix(spec, head_dim, position)[None, None])


def positions(length: int, cached: mx.array | int, first_B: mx.array | None) -> mx.array:
    """Return the positions of T tokens after `cached` ones: [T], or [B, T] where row b starts at slot `first_B`.

    Padding before the first token of a row has negative positions.
    """
    slot_T = mx.arange(length) + cached
    return slot_T if first_B is None else slot_T - first_B[:, None]


def same_side(position_T: mx.array, position_S: mx.array) -> mx.array:
    """Return the mask of pairs that are both tokens, or both padding: bool [..., T, S].

    Padding must attend to something: a softmax over nothing is NaN, which spreads to tokens even with a weight of 0.
    """
    return (position_T[..., :, None] >= 0) == (position_S[..., None, :] >= 0)


class EmbeddingPosition(nn.Module):
    """Spec: moezoo.core.reference.positions.embedding_positions."""

    def __init__(self, spec: EmbeddingPositionSpec, embed_dim: int, weights: Weights):
        super().__init__()
        self.spec = spec
        self.embed_dim = embed_dim
        if isinstance(spec, LearnedPositionsSpec):
            self.weight = weights.parameter("weight")

    def __call__(self, position_T: mx.array) -> mx.array:
        match self.spec:
            case LearnedPositionsSpec():
                return take(self.weight, position_T).astype(mx.float32)
            case SinusoidalPositionsSpec():
                angle = _angle(position_T, sinusoidal_frequencies(self.spec, self.embed_dim))
                waves = mx.stack([mx.sin(angle), mx.cos(angle)], axis=-1)
                return waves.reshape(*position_T.shape, -1)[..., : self.embed_dim]
            case _:
                assert_never(self.spec)


def _angle(position_T: mx.array, frequency: np.ndarray) -> mx.array:
    """Return positions times frequencies, in float32."""
    return position_T[..., None].astype(mx.float32) * mx.array(frequency.astype(np.float32))
