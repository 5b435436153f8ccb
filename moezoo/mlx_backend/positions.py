"""Position encodings. Spec: moezoo.core.reference.positions."""

import functools
from typing import NamedTuple, assert_never

import mlx.core as mx
import numpy as np
from mlx import nn

from moezoo.core.reference.positions import frequencies, sinusoidal_frequencies
from moezoo.core.spec import (
    EmbeddingPositionSpec,
    LearnedPositionsSpec,
    RelativePositionSpec,
    RoPESpec,
    SinusoidalPositionsSpec,
    TemperatureTuningSpec,
)
from moezoo.core.tokens import PADDING
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.distributed.data_parallel import average
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.rotation import turning_matrix, turns_by_matrix
from moezoo.mlx_backend.normalization import l2_clipped
from moezoo.mlx_backend.quantization import take


class Documents(NamedTuple):
    """Spec: moezoo.core.reference.positions.Documents."""

    document_BT: mx.array
    position_BT: mx.array

    @property
    def real_P(self) -> mx.array:
        """Spec: moezoo.core.reference.positions.Documents.real_P."""
        return self.document_BT.reshape(-1) != PADDING

    @property
    def number_P(self) -> mx.array:
        """Spec: moezoo.core.reference.positions.Documents.number_P."""
        first_P = self.real_P & (self.position_BT.reshape(-1) == 0)
        return mx.where(self.real_P, mx.cumsum(first_P.astype(mx.int32)) - 1, -1)


def packed_documents(document_BT: mx.array | None) -> Documents | None:
    """Spec: moezoo.core.reference.positions.packed_documents."""
    if document_BT is None:
        return None
    slot_T = mx.arange(document_BT.shape[1])
    begins_BT = document_BT[:, 1:] != document_BT[:, :-1]
    first_BT = mx.cummax(mx.pad(mx.where(begins_BT, slot_T[1:], 0), [(0, 0), (1, 0)]), axis=1)
    return Documents(document_BT, mx.where(document_BT == PADDING, 0, slot_T - first_BT))


def token_mean(value: mx.array, real_P: mx.array | None = None) -> mx.array:
    """Spec: moezoo.core.reference.positions.token_mean."""
    if real_P is None:
        return mx.mean(value, axis=0)
    real = real_P.reshape(-1, *(1,) * (value.ndim - 1))
    return mx.sum(mx.where(real, value, 0.0), axis=0) / average(mx.sum(real_P))


def causal_windows(x: mx.array, before: mx.array, documents: Documents | None = None) -> list[mx.array]:
    """Spec: moezoo.core.reference.positions.causal_windows; `before`: the width - 1 earlier inputs."""
    width, length = before.shape[1] + 1, x.shape[1]
    padded = mx.concatenate([before, x], axis=1)
    inputs = [padded[:, start : start + length] for start in range(width)]
    if documents is not None:
        position = documents.position_BT.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))
        inputs = [mx.where(position >= width - 1 - start, own, 0).astype(own.dtype) for start, own in enumerate(inputs)]
    return inputs


def within_documents(mask_TS: mx.array, documents: Documents | None) -> mx.array:
    """Spec: moezoo.core.reference.positions.within_documents."""
    return mask_TS if documents is None else mask_TS & same_document(documents.document_BT, documents.document_BT)


def same_document(document_BT: mx.array, document_BS: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.positions.same_document."""
    return document_BT[:, :, None] == document_BS[:, None, :]


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


class Relative(NamedTuple):
    """Features of relative position logits, one number per profile for each head of each query, and the profiles."""

    feature_BTNZ: mx.array
    profile_ZS: mx.array


class RelativePosition(nn.Module):
    """Parameters of relative position logits. Spec: moezoo.core.reference.positions.relative_features."""

    def __init__(self, spec: RelativePositionSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.w_feature = weights.parameter("w_feature")
        self.profile = weights.parameter("profile")
        if spec.l2_clip is not None:
            self.scale = weights.parameter("scale")

    def __call__(self, x_BTD: mx.array) -> Relative:
        """Return the features and the profiles, in float32."""
        feature = projection.einsum("BTD,DNZ->BTNZ", x_BTD, self.w_feature.astype(x_BTD.dtype)).astype(mx.float32)
        if self.spec.l2_clip is not None:
            feature = l2_clipped(feature * self.scale.astype(mx.float32), self.spec.l2_clip)
        return Relative(feature, self.profile.astype(mx.float32))


def relative_bias(
    relative: Relative | None, position_T: mx.array, position_S: mx.array, rows: slice = slice(None)
) -> mx.array | None:
    """Spec: moezoo.core.reference.positions.relative_bias; of these rows of the queries, if there is any."""
    if relative is None:
        return None
    distance_TS = position_T[..., :, None] - position_S[..., None, :]
    extent = relative.profile_ZS.shape[1]
    profile = relative.profile_ZS[:, mx.clip(distance_TS, 0, extent - 1)]
    profile = mx.where((distance_TS >= 0) & (distance_TS < extent), profile, 0.0)
    if profile.ndim == 3:
        return mx.einsum("BTNZ,ZTS->BNTS", relative.feature_BTNZ[:, rows], profile)
    return mx.einsum("BTNZ,ZBTS->BNTS", relative.feature_BTNZ[:, rows], profile)


def positions(
    length: int, cached: mx.array | int, first_B: mx.array | None, documents: Documents | None = None
) -> mx.array:
    """Return the positions of T tokens after `cached` ones: [T], or [B, T] where row b starts at slot `first_B`.

    Padding before the first token of a row has negative positions. In the documents of packed sequences, they restart.
    """
    if documents is not None:
        return documents.position_BT
    slot_T = mx.arange(length) + cached
    return slot_T if first_B is None else slot_T - first_B[:, None]


def positions_of(slot_S: mx.array, first_B: mx.array | None) -> mx.array:
    """Return the positions of cache slots: [S], or [B, S] with padding."""
    return slot_S if first_B is None else slot_S - first_B[:, None]


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


def temperature(spec: TemperatureTuningSpec, position_T: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.positions.temperature; float32."""
    if spec.form == "log":
        return 1 + spec.scale * mx.log(mx.maximum((position_T + spec.first) / spec.floor_length, 1.0))
    if spec.form == "power":
        return mx.exp(spec.scale * mx.log1p((position_T + spec.first) / spec.floor_length))
    return 1 + spec.scale * mx.log1p((position_T + spec.first) // spec.floor_length)
