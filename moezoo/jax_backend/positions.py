"""Position encodings. Spec: moezoo.core.reference.positions."""

from functools import partial
from typing import Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

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
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.normalization import l2_clipped
from moezoo.jax_backend.quantization import take

Layout = Literal["half_split", "interleaved"]


class Documents(NamedTuple):
    """Spec: moezoo.core.reference.positions.Documents."""

    document_BT: jax.Array
    position_BT: jax.Array

    @property
    def real_P(self) -> jax.Array:
        """Spec: moezoo.core.reference.positions.Documents.real_P."""
        return self.document_BT.reshape(-1) != PADDING

    @property
    def number_P(self) -> jax.Array:
        """Spec: moezoo.core.reference.positions.Documents.number_P."""
        first_P = self.real_P & (self.position_BT.reshape(-1) == 0)
        return jnp.where(self.real_P, jnp.cumsum(first_P) - 1, -1)


def packed_documents(document_BT: jax.Array | None) -> Documents | None:
    """Spec: moezoo.core.reference.positions.packed_documents."""
    if document_BT is None:
        return None
    slot_T = jnp.arange(document_BT.shape[1])
    begins_BT = document_BT[:, 1:] != document_BT[:, :-1]
    first_BT = lax.cummax(jnp.pad(jnp.where(begins_BT, slot_T[1:], 0), [(0, 0), (1, 0)]), axis=1)
    return Documents(document_BT, jnp.where(document_BT == PADDING, 0, slot_T - first_BT))


def token_mean(value: jax.Array, real_P: jax.Array | None = None) -> jax.Array:
    """Spec: moezoo.core.reference.positions.token_mean."""
    if real_P is None:
        return jnp.mean(value, axis=0)
    real = real_P.reshape(-1, *(1,) * (value.ndim - 1))
    return jnp.sum(jnp.where(real, value, 0.0), axis=0) / jnp.sum(real_P)


def causal_windows(x: jax.Array, before: jax.Array, documents: Documents | None = None) -> list[jax.Array]:
    """Spec: moezoo.core.reference.positions.causal_windows; `before`: the width - 1 earlier inputs."""
    width, length = before.shape[1] + 1, x.shape[1]
    padded = jnp.concatenate([before, x], axis=1)
    inputs = [padded[:, start : start + length] for start in range(width)]
    if documents is not None:
        position = documents.position_BT.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))
        inputs = [jnp.where(position >= width - 1 - start, own, 0) for start, own in enumerate(inputs)]
    return inputs


def within_documents(mask_TS: jax.Array, documents: Documents | None) -> jax.Array:
    """Spec: moezoo.core.reference.positions.within_documents."""
    return mask_TS if documents is None else mask_TS & same_document(documents.document_BT, documents.document_BT)


def same_document(document_BT: jax.Array, document_BS: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.positions.same_document."""
    return document_BT[:, :, None] == document_BS[:, None, :]


def rotate(spec: RoPESpec, x_BTNH: jax.Array, position_T: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.positions.rotate; positions [T], or [B, T] where rows start at different slots."""
    frequency, attention_factor = frequencies(spec, x_BTNH.shape[-1])
    rotated_dim = 2 * len(frequency)
    angle = _angle(position_T, frequency)[..., None, :]
    # Trap: XLA would recompute cosine and sine for each head of each sequence, in every operation that uses the result.
    cosine, sine = lax.optimization_barrier((attention_factor * jnp.cos(angle), attention_factor * jnp.sin(angle)))
    out = _rotated_pairs(spec.layout, x_BTNH[..., :rotated_dim].astype(jnp.float32), cosine, sine).astype(x_BTNH.dtype)
    return out if rotated_dim == x_BTNH.shape[-1] else jnp.concatenate([out, x_BTNH[..., rotated_dim:]], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotated_pairs(layout: Layout, x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Rotate each pair of features by its angle, and scale it; the backward pass rotates by the negative angle."""

    def turn(first: jax.Array, second: jax.Array) -> list[jax.Array]:
        return [first * cosine - second * sine, second * cosine + first * sine]

    match layout:
        case "half_split":
            return jnp.concatenate(turn(*jnp.split(x, 2, axis=-1)), axis=-1)
        case "interleaved":
            pairs = x.reshape(*x.shape[:-1], -1, 2)
            return jnp.stack(turn(pairs[..., 0], pairs[..., 1]), axis=-1).reshape(x.shape)
        case _:
            assert_never(layout)


def _rotated_pairs_forward(
    layout: Layout, x: jax.Array, cosine: jax.Array, sine: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rotated_pairs(layout, x, cosine, sine), (cosine, sine)


def _rotated_pairs_backward(
    layout: Layout, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    cosine, sine = saved
    return _rotated_pairs(layout, gradient, cosine, -sine), None, None


_rotated_pairs.defvjp(_rotated_pairs_forward, _rotated_pairs_backward)


class Relative(NamedTuple):
    """Features of relative position logits, one number per profile for each head of each query, and the profiles."""

    feature_BTNZ: jax.Array
    profile_ZS: jax.Array


class RelativePosition(nnx.Module):
    """Parameters of relative position logits. Spec: moezoo.core.reference.positions.relative_features."""

    def __init__(self, spec: RelativePositionSpec, weights: Weights):
        self.spec = spec
        self.w_feature = weights.parameter("w_feature")
        self.profile = weights.parameter("profile")
        if spec.l2_clip is not None:
            self.scale = weights.parameter("scale")

    def __call__(self, x_BTD: jax.Array) -> Relative:
        """Return the features and the profiles, in float32."""
        feature = projection.einsum("BTD,DNZ->BTNZ", x_BTD, self.w_feature[...].astype(x_BTD.dtype)).astype(jnp.float32)
        if self.spec.l2_clip is not None:
            feature = l2_clipped(feature * self.scale[...].astype(jnp.float32), self.spec.l2_clip)
        return Relative(feature, self.profile[...].astype(jnp.float32))


def relative_bias(
    relative: Relative | None, position_T: jax.Array, position_S: jax.Array, rows: slice = slice(None)
) -> jax.Array | None:
    """Spec: moezoo.core.reference.positions.relative_bias; of these rows of the queries, if there is any."""
    if relative is None:
        return None
    distance_TS = position_T[..., :, None] - position_S[..., None, :]
    extent = relative.profile_ZS.shape[1]
    profile = relative.profile_ZS[:, jnp.clip(distance_TS, 0, extent - 1)]
    profile = jnp.where((distance_TS >= 0) & (distance_TS < extent), profile, 0.0)
    if profile.ndim == 3:
        return jnp.einsum("BTNZ,ZTS->BNTS", relative.feature_BTNZ[:, rows], profile)
    return jnp.einsum("BTNZ,ZBTS->BNTS", relative.feature_BTNZ[:, rows], profile)


def positions(
    length: int, cached: jax.Array | int, first_B: jax.Array | None, documents: Documents | None = None
) -> jax.Array:
    """Return the positions of T tokens after `cached` ones: [T], or [B, T] where row b starts at slot `first_B`.

    Padding before the first token of a row has negative positions. In the documents of packed sequences, they restart.
    """
    if documents is not None:
        return documents.position_BT
    slot_T = jnp.arange(length) + cached
    return slot_T if first_B is None else slot_T - first_B[:, None]


def positions_of(slot_S: jax.Array, first_B: jax.Array | None) -> jax.Array:
    """Return the positions of cache slots: [S], or [B, S] with padding."""
    return slot_S if first_B is None else slot_S - first_B[:, None]


def same_side(position_T: jax.Array, position_S: jax.Array) -> jax.Array:
    """Return the mask of pairs that are both tokens, or both padding: bool [..., T, S].

    Padding must attend to something: a softmax over nothing is NaN, which spreads to tokens even with a weight of 0.
    """
    return (position_T[..., :, None] >= 0) == (position_S[..., None, :] >= 0)


class EmbeddingPosition(nnx.Module):
    """Spec: moezoo.core.reference.positions.embedding_positions."""

    def __init__(self, spec: EmbeddingPositionSpec, embed_dim: int, weights: Weights):
        self.spec = spec
        self.embed_dim = embed_dim
        if isinstance(spec, LearnedPositionsSpec):
            self.weight = weights.parameter("weight")

    def __call__(self, position_T: jax.Array) -> jax.Array:
        match self.spec:
            case LearnedPositionsSpec():
                return take(self.weight[...], position_T).astype(jnp.float32)
            case SinusoidalPositionsSpec():
                angle = _angle(position_T, sinusoidal_frequencies(self.spec, self.embed_dim))
                waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
                return waves.reshape(*position_T.shape, -1)[..., : self.embed_dim]
            case _:
                assert_never(self.spec)


def _angle(position_T: jax.Array, frequency: np.ndarray) -> jax.Array:
    """Return positions times frequencies, in float32."""
    return position_T[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)


def temperature(spec: TemperatureTuningSpec, position_T: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.positions.temperature; float32."""
    if spec.form == "log":
        return 1 + spec.scale * jnp.log(jnp.maximum((position_T + spec.first) / spec.floor_length, 1.0))
    if spec.form == "power":
        return jnp.exp(spec.scale * jnp.log1p((position_T + spec.first) / spec.floor_length))
    return 1 + spec.scale * jnp.log1p((position_T + spec.first) // spec.floor_length)
