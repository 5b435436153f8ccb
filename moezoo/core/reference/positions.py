"""Position encodings: RoPE and relative position logits in attention, and vectors added to the token embeddings."""

import functools
import math
from typing import NamedTuple, assert_never

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter
from moezoo.core.reference.normalization import l2_clipped
from moezoo.core.spec import (
    DynamicScalingSpec,
    EmbeddingPositionSpec,
    LearnedPositionsSpec,
    LinearScalingSpec,
    Llama3ScalingSpec,
    LongRoPEScalingSpec,
    PositionSpec,
    RelativePositionSpec,
    RoPEScalingSpec,
    RoPESpec,
    SinusoidalPositionsSpec,
    TemperatureTuningSpec,
    YaRNScalingSpec,
)
from moezoo.core.tokens import PADDING


class Documents(NamedTuple):
    """Documents that packed sequences hold, one after the other; no token sees one of another document.

    Fields:
        document_BT: int, the document of each token, ascending along a sequence; PADDING in the places after the last
            one, which see each other and nothing else.
        position_BT: int, the index of each token in its document; 0 in padding.
    """

    document_BT: Array
    position_BT: Array

    @property
    def real_P(self) -> Array:
        """True where one of the P = B * T places holds a token of a document: bool [P]."""
        return self.document_BT.reshape(-1) != PADDING

    @property
    def number_P(self) -> Array:
        """The number of each token's document among those of all sequences, from 0; -1 for padding: int [P]."""
        first_P = self.real_P & (self.position_BT.reshape(-1) == 0)
        return np.where(self.real_P, np.cumsum(first_P) - 1, -1)


def packed_documents(document_BT: Array | None) -> Documents | None:
    """Return the documents of packed sequences: the position of a token is the number of those before it in its own.

    None of None: every sequence is one document.
    """
    if document_BT is None:
        return None
    position_BT = np.sum(np.tril(same_document(document_BT, document_BT), -1), axis=-1)
    return Documents(document_BT, np.where(document_BT == PADDING, 0, position_BT))


def token_mean(value: Array, real_P: Array | None = None) -> Array:
    """Return the mean over tokens, of those that are `real_P` if it is given: [P, ...] -> [...]."""
    return np.mean(value if real_P is None else value[real_P], axis=0)


def causal_windows(x: Array, width: int, documents: Documents | None = None) -> list[Array]:
    """Return x of each token of the causal window: `x[t - (width - 1)], ..., x[t - 1], x[t]`, of the shape of x each.

    Tokens before the first, of a sequence or of each of its documents, are zero.
    """
    batch, length, *features = x.shape
    padded = np.concatenate([np.zeros((batch, width - 1, *features)), x], axis=1)
    rows = [padded[:, start : start + length] for start in range(width)]
    if documents is not None:
        position = documents.position_BT.reshape(batch, length, *(1 for _ in features))
        rows = [np.where(position >= width - 1 - start, row, 0.0) for start, row in enumerate(rows)]
    return rows


def within_documents(mask_TS: Array, documents: Documents | None) -> Array:
    """Return a mask of attention that is False between documents, if there are any: bool [T, S], or [B, T, S]."""
    return mask_TS if documents is None else mask_TS & same_document(documents.document_BT, documents.document_BT)


def same_document(document_BT: Array, document_BS: Array) -> Array:
    """Return the mask of pairs of tokens of one document, or both in the padding: bool [B, T, S]."""
    return document_BT[:, :, None] == document_BS[:, None, :]


def rotate(spec: RoPESpec, x_BTNH: Array, position_T: Array) -> Array:
    """Apply rotary position embeddings (RoPE): rotate feature pair i of a head by `t * frequency_i` at position t.

    Of the n rotated features, pair i is features i and i + n/2 (`half_split`, NeoX) or 2i and 2i + 1 (`interleaved`,
    GPT-J). Features from n on are unchanged (partial rotary); with `fraction_of: pairs`, where n = H, so are all but
    the first pairs. Rotated features are multiplied by the attention factor of the scaling, which is 1 without scaling.

    Args:
        spec: base, layout, fraction n / H, and scaling.
        x_BTNH: queries or keys (M heads in place of N for keys), n even.
        position_T: int, the position of each token, counted from 0: [T], or [B, T] in packed sequences.

    Returns:
        [B, T, N, H].

    Source: Su et al. 2021, arXiv 2104.09864, eq. 34.
    Differs: the paper interleaves pairs; Llama and similar models split halves, which only permutes features.
    """
    frequency, attention_factor = frequencies(spec, x_BTNH.shape[-1])
    rotated_dim = 2 * len(frequency)
    angle = (position_T[..., None] * frequency)[..., None, :]
    cosine, sine = attention_factor * np.cos(angle), attention_factor * np.sin(angle)

    def turn(first: Array, second: Array) -> list[Array]:
        return [first * cosine - second * sine, second * cosine + first * sine]

    x, rest = x_BTNH[..., :rotated_dim], x_BTNH[..., rotated_dim:]
    match spec.layout:
        case "half_split":
            out = np.concatenate(turn(x[..., : rotated_dim // 2], x[..., rotated_dim // 2 :]), axis=-1)
        case "interleaved":
            out = np.reshape(np.stack(turn(x[..., 0::2], x[..., 1::2]), axis=-1), x.shape)
        case _:
            assert_never(spec.layout)
    return np.concatenate([out, rest], axis=-1)


@functools.cache
def frequencies(spec: RoPESpec, head_dim: int) -> tuple[Array, float]:
    """Return the RoPE frequencies `base^(-2 i / n)` of the n rotated features, after scaling.

    With `fraction_of: pairs`, n is H, and the frequency is 0 from pair `floor(fraction * H / 2)` on. Both backends use
    these numbers, rounded once, so that their angles are equal.

    Args:
        spec: base, fraction n / H, and scaling.
        head_dim: H.

    Returns:
        Read-only float64 [n / 2], radians per token; and the attention factor that multiplies rotated features.
    """
    rotated_dim = spec.rotated_dim(head_dim)
    frequency = spec.base ** (-np.arange(rotated_dim // 2) * 2 / rotated_dim)
    frequency[spec.turning_pairs(head_dim) :] = 0.0
    attention_factor = 1.0
    if spec.scaling is not None:
        frequency, attention_factor = _scaled(spec.scaling, frequency, spec.base)
    frequency.setflags(write=False)
    return frequency, attention_factor


def _scaled(scaling: RoPEScalingSpec, frequency: Array, base: float) -> tuple[Array, float]:
    match scaling:
        case LinearScalingSpec():
            return frequency / scaling.factor, 1.0
        case Llama3ScalingSpec():
            return llama3_scaled(scaling, frequency), 1.0
        case YaRNScalingSpec():
            return yarn_scaled(scaling, frequency, base), yarn_attention_factor(scaling)
        case LongRoPEScalingSpec():
            return longrope_scaled(scaling, frequency), longrope_attention_factor(scaling)
        case DynamicScalingSpec():
            return dynamic_scaled(scaling, frequency), 1.0
        case _:
            assert_never(scaling)


def llama3_scaled(spec: Llama3ScalingSpec, frequency: Array) -> Array:
    """Scale frequencies as Llama 3 does: `frequency * ((1 - fast) / factor + fast)`.

    `turns = original_length * frequency / (2 pi)`, and `fast = clip((turns - low) / (high - low), 0, 1)`;
    if high equals low, fast steps from 0 to 1 there.

    Source: released code of Llama 3.1; the model: Dubey et al. 2024, arXiv 2407.21783.
    """
    turns = spec.original_length * frequency / (2 * math.pi)
    low, high = spec.low_frequency_factor, spec.high_frequency_factor
    fast = turns >= low if high == low else np.clip((turns - low) / (high - low), 0, 1)
    return frequency * ((1 - fast) / spec.factor + fast)


def yarn_scaled(spec: YaRNScalingSpec, frequency: Array, base: float) -> Array:
    """Scale frequencies as YaRN does: `frequency * (slow / factor + 1 - slow)`.

    `slow` ramps from 0 to 1 between the pairs `pair(beta_fast)` and `pair(beta_slow)`, where
    `pair(beta) = n ln(original_length / (2 pi beta)) / (2 ln base)` makes beta turns in `original_length` tokens; with
    `truncate` the first is rounded down and the second up.

    Source: Peng et al. 2023, arXiv 2309.00071, section 3.2.
    Differs: the ramp runs over pairs, as in released code, not over turns, as in the paper.
    """
    rotated_dim = 2 * len(frequency)

    def pair(beta: float) -> float:
        return rotated_dim * math.log(spec.original_length / (2 * math.pi * beta)) / (2 * math.log(base))

    first, last = pair(spec.beta_fast), pair(spec.beta_slow)
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated_dim - 1)
    if first == last:
        last += 0.001
    slow = np.clip((np.arange(len(frequency)) - first) / (last - first), 0, 1)
    return frequency * (slow / spec.factor + 1 - slow)


def yarn_attention_factor(spec: YaRNScalingSpec) -> float:
    """YaRN's attention factor: `m(mscale) / m(mscale_all_dim)`, or m(1) if one is null; `m(s) = 0.1 s ln(factor) + 1`.

    Source: Peng et al. 2023, arXiv 2309.00071, section 3.4 (m(1)); the quotient: DeepSeek-V2's released code.
    """
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale is None or spec.mscale_all_dim is None:
        return _mscale(spec, 1.0)
    return _mscale(spec, spec.mscale) / _mscale(spec, spec.mscale_all_dim)


def score_multiplier(spec: PositionSpec) -> float:
    """Return the factor on the scores of latent attention, beside their scale: YaRN's `m(mscale_all_dim)^2`, else 1.

    Source: DeepSeek-V2's released code; m is that of `yarn_attention_factor`.
    """
    match spec:
        case RoPESpec(scaling=YaRNScalingSpec(mscale_all_dim=float(mscale)) as scaling):
            return _mscale(scaling, mscale) ** 2
        case _:
            return 1.0


def _mscale(spec: YaRNScalingSpec, mscale: float) -> float:
    return 0.1 * mscale * math.log(spec.factor) + 1


def longrope_scaled(spec: LongRoPEScalingSpec, frequency: Array) -> Array:
    """Scale frequencies as LongRoPE does: divide each by its factor, a long one if `length > original_length`.

    Source: Ding et al. 2024, arXiv 2402.13753, section 3, in the form of Phi-3's released code.
    """
    long = spec.length > spec.original_length
    return frequency / np.array(spec.long_factors if long else spec.short_factors)


def longrope_attention_factor(spec: LongRoPEScalingSpec) -> float:
    """LongRoPE's attention factor: `sqrt(1 + ln(length / original_length) / ln(original_length))`, at least 1."""
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.length <= spec.original_length:
        return 1.0
    return math.sqrt(1 + math.log(spec.length / spec.original_length) / math.log(spec.original_length))


def dynamic_scaled(spec: DynamicScalingSpec, frequency: Array) -> Array:
    """Scale frequencies as dynamic NTK does: `frequency_i * r^(-2 i / (n - 2))`.

    `r = max(1, factor * length / original_length - (factor - 1))`. It equals a base of `base * r^(n / (n - 2))`: the
    fastest pair keeps its frequency, the slowest is divided by r.

    Source: bloc97 and emozilla 2023 ("dynamic NTK"), in the form of transformers' modeling_rope_utils.py.
    """
    stretch = max(1.0, spec.factor * spec.length / spec.original_length - (spec.factor - 1))
    return frequency * stretch ** (-np.arange(len(frequency)) / (len(frequency) - 1))


def relative_features(spec: RelativePositionSpec, parameters: Parameters, x_BTD: Array) -> Array:
    """Return what each head of each token gives to the profiles of relative position logits: [B, T, N, Z].

    `x w_feature`; with an L2 clip, that times `scale` [N, Z], then clipped.

    Source: see RelativePositionSpec.
    """
    feature = adapter.einsum("BTD,DNZ->BTNZ", x_BTD, parameters["w_feature"])
    return feature if spec.l2_clip is None else l2_clipped(feature * parameters["scale"], spec.l2_clip)


def relative_bias(relative_BTNZ: Array, profile_ZS: Array, position_T: Array, position_S: Array) -> Array:
    """Relative position logits: `bias[t, s] = relative_t . profile[t - s]`, 0 for other distances than it has.

    Args:
        relative_BTNZ: what each head of each query gives to the Z profiles.
        profile_ZS: the profiles, over as many distances as it has.
        position_T, position_S: of queries and keys, [T] and [S], or [B, T] and [B, S].

    Returns:
        [B, N, T, S].

    Source: Shaw et al. 2018, arXiv 1803.02155, eq. 4, with features of a projection of their own in place of the query:
    Thinking Machines 2026 (Inkling; transformers 5.23, `InklingRelativeLogits`).
    """
    distance_TS = position_T[..., :, None] - position_S[..., None, :]
    extent = profile_ZS.shape[1]
    profile = profile_ZS[:, np.clip(distance_TS, 0, extent - 1)]
    profile = np.where((distance_TS >= 0) & (distance_TS < extent), profile, 0.0)
    if profile.ndim == 3:
        return np.einsum("BTNZ,ZTS->BNTS", relative_BTNZ, profile)
    return np.einsum("BTNZ,ZBTS->BNTS", relative_BTNZ, profile)


def embedding_positions(
    spec: EmbeddingPositionSpec, embed_dim: int, parameters: Parameters, position_T: Array
) -> Array:
    """Return the absolute position embeddings that are added to the token embeddings at these positions.

    `learned` is row t of the parameter `weight`. `sinusoidal` has `sin(t base^(-2i/D))` as feature 2i and the cosine
    of that angle as feature 2i + 1.

    Args:
        spec: the kind.
        embed_dim: D.
        parameters: `weight` [max_length, D] for the learned kind.
        position_T: int, the position of each token, below `max_length`: [T], or [B, T] in packed sequences.

    Returns:
        [T, D] or [B, T, D], in float32 for every compute dtype.

    Source: learned: Gehring et al. 2017, arXiv 1705.03122, section 3.1; sinusoidal: Vaswani et al. 2017, arXiv
    1706.03762, section 3.5.
    """
    match spec:
        case LearnedPositionsSpec():
            return parameters["weight"][position_T]
        case SinusoidalPositionsSpec():
            angle = position_T[..., None] * sinusoidal_frequencies(spec, embed_dim)
            waves = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
            return np.reshape(waves, (*position_T.shape, -1))[..., :embed_dim]
        case _:
            assert_never(spec)


@functools.cache
def sinusoidal_frequencies(spec: SinusoidalPositionsSpec, embed_dim: int) -> Array:
    """Return `base^(-2i/D)` for each sine-cosine pair, of which the last may lack its cosine: read-only float64."""
    frequency = spec.base ** (-np.arange((embed_dim + 1) // 2) * 2 / embed_dim)
    frequency.setflags(write=False)
    return frequency


def temperature(spec: TemperatureTuningSpec, position_T: Array) -> Array:
    """Return the temperature by which queries are multiplied: `1 + scale * ln(1 + floor((t + first) / floor_length))`.

    Or, with `form: power`, `(1 + (t + first) / floor_length) ** scale`; with `form: log`,
    `1 + scale * ln(max(1, (t + first) / floor_length))`. [T], one factor per position t.

    Source: Nakanishi 2025, arXiv 2501.19399 (`s ln n` for n tokens).
    Differs: Llama-4's form, which changes in steps and is 1 for the first `floor_length - first` tokens; Beam's form;
    Inkling's, which is 1 as long, and has no steps.
    """
    if spec.form == "log":
        return 1 + spec.scale * np.log(np.maximum((position_T + spec.first) / spec.floor_length, 1.0))
    if spec.form == "power":
        return np.exp(spec.scale * np.log1p((position_T + spec.first) / spec.floor_length))
    return 1 + spec.scale * np.log1p((position_T + spec.first) // spec.floor_length)
