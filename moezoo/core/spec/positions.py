"""Position encodings as data: RoPE inside attention, and vectors added to the embedding."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, impossible

# --- RoPE scaling to longer contexts ---------------------------------------------------------------------------------


class LinearScalingSpec(Part):
    """Position interpolation: every angle is divided by `factor`. Source: Chen et al. 2023, arXiv 2306.15595."""

    kind: Literal["linear"] = "linear"
    factor: Annotated[float, Field(ge=1)]


class Llama3ScalingSpec(Part):
    """RoPE scaling of Llama 3. Source: Dubey 2024 (Llama 3), arXiv 2407.21783.

    Low frequencies are divided by `factor`, high ones are unchanged, with a linear ramp between. A pair has a low
    frequency if it makes less than `low_frequency_factor` turns in `original_length` tokens, and a high one if it makes
    more than `high_frequency_factor`. If the two are equal (Llama-4) there is no ramp, and a pair exactly at the
    boundary counts as high.
    """

    kind: Literal["llama3"] = "llama3"
    factor: Annotated[float, Field(ge=1)]
    original_length: PositiveInt
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _order(self) -> "Llama3ScalingSpec":
        if self.high_frequency_factor < self.low_frequency_factor:
            raise impossible(
                "high_frequency_factor",
                f"is {self.high_frequency_factor}, below low_frequency_factor = {self.low_frequency_factor}",
                f"Use at least {self.low_frequency_factor}",
            )
        return self


class YaRNScalingSpec(Part):
    """YaRN RoPE scaling. Source: Peng et al. 2023, arXiv 2309.00071.

    Like `llama3`, but the ramp is linear in the index of the pair, and attention is sharpened: rotated features are
    multiplied by `attention_factor`; null: `m(mscale) / m(mscale_all_dim)` with `m(s) = 0.1 s ln(factor) + 1`, or m(1)
    if either is null. `mscale_all_dim` also multiplies the scores of latent attention by `m(mscale_all_dim)^2`
    (DeepSeek-V2). The ramp runs from the pair that makes `beta_fast` turns in `original_length` tokens to the one that
    makes `beta_slow` turns; `truncate` rounds both outwards to whole pairs.
    """

    kind: Literal["yarn"] = "yarn"
    factor: Annotated[float, Field(ge=1)]
    original_length: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _order(self) -> "YaRNScalingSpec":
        if self.beta_fast < self.beta_slow:
            raise impossible(
                "beta_fast",
                f"is {self.beta_fast}, below beta_slow = {self.beta_slow}",
                f"Use at least {self.beta_slow}",
            )
        return self


class LongRoPEScalingSpec(Part):
    """LongRoPE scaling: each pair has its own divisor. Source: Ding et al. 2024, arXiv 2402.13753 (Phi-3).

    The divisors are `long_factors` if `length > original_length`, else `short_factors`. Differs: `length` is a constant
    of the spec, not the length of the current sequence, so a token's rotation does not change when a sequence grows
    past the original length. `attention_factor` multiplies rotated features; null:
    `sqrt(1 + ln(length / original) / ln(original))`, and 1 with `short_factors`.
    """

    kind: Literal["longrope"] = "longrope"
    short_factors: tuple[PositiveFloat, ...]
    long_factors: tuple[PositiveFloat, ...]
    original_length: Annotated[int, Field(ge=2)]
    length: PositiveInt
    attention_factor: PositiveFloat | None = None


class DynamicScalingSpec(Part):
    """Dynamic NTK-aware scaling: a larger base, so that only the lowest frequency is scaled in full.

    If `length > original_length`, the base of n rotated features is multiplied by
    `(factor * length / original_length - (factor - 1))^(n / (n - 2))`; else nothing changes. Source: bloc97 and
    emozilla 2023, in the form of transformers. Differs: `length` is a constant of the spec, as in `longrope`.
    """

    kind: Literal["dynamic"] = "dynamic"
    factor: Annotated[float, Field(ge=1)]
    original_length: PositiveInt
    length: PositiveInt


RoPEScalingSpec = Annotated[
    LinearScalingSpec | Llama3ScalingSpec | YaRNScalingSpec | LongRoPEScalingSpec | DynamicScalingSpec,
    Field(discriminator="kind"),
]

# --- inside attention ------------------------------------------------------------------------------------------------


class RoPESpec(Part):
    """Rotary position embedding. Source: Su et al. 2021, arXiv 2104.09864.

    `layout`: pair i of the n rotated features is (i, i + n/2) for `half_split` (NeoX) or (2i, 2i + 1) for `interleaved`
    (GPT-J). `fraction` is the share of a head that is rotated (partial rotary). With `fraction_of: features` the first
    n features are rotated, paired among themselves, with frequencies over the whole range. With `fraction_of: pairs`
    all features form pairs and the first pairs are rotated, at the same frequencies as in full rotary (Gemma 4's
    proportional RoPE).
    """

    kind: Literal["rope"] = "rope"
    base: Annotated[float, Field(gt=1)] = 10_000.0
    layout: Literal["half_split", "interleaved"] = "half_split"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    fraction_of: Literal["features", "pairs"] = "features"
    scaling: RoPEScalingSpec | None = None

    @model_validator(mode="after")
    def _part(self) -> "RoPESpec":
        if self.fraction_of == "pairs" and self.fraction == 1:
            raise impossible(
                "fraction_of",
                "is pairs, but fraction is 1, which rotates all pairs",
                "Remove it, or set fraction below 1",
            )
        return self

    @property
    def max_length(self) -> int | None:
        """Maximum sequence length of the scaling; None if unlimited."""
        match self.scaling:
            case LongRoPEScalingSpec(length=length) | DynamicScalingSpec(length=length):
                return length
            case _:
                return None

    def rotated_dim(self, head_dim: int) -> int:
        """Number of a head's features that form pairs; with `fraction_of: pairs` some of these are not rotated."""
        return head_dim if self.fraction_of == "pairs" else int(head_dim * self.fraction)

    def turning_pairs(self, head_dim: int) -> int:
        """Number of rotated pairs."""
        return int(self.fraction * head_dim // 2) if self.fraction_of == "pairs" else self.rotated_dim(head_dim) // 2

    def check(self, head_dim: int, path: str) -> None:
        """Raise if a head of this width cannot be rotated; `path` is the width's field in the calling part."""
        rotated = self.rotated_dim(head_dim)
        if rotated % 2 or self.turning_pairs(head_dim) == 0:
            shown = rotated if rotated % 2 else 0
            part = "" if shown == head_dim else f" and {shown} of its features are rotated (fraction {self.fraction})"
            raise impossible(
                path,
                f"is {head_dim}{part}, but RoPE rotates pairs of features",
                "Use an even number, or position: {kind: none}",
            )
        match self.scaling:
            case LongRoPEScalingSpec(short_factors=short, long_factors=long):
                if {len(short), len(long)} != {rotated // 2}:
                    raise impossible(
                        "position.scaling",
                        f"has {len(short)} short and {len(long)} long factors, but {rotated // 2} pairs are rotated",
                        f"Set {rotated // 2} of each",
                    )
            case DynamicScalingSpec() if rotated == 2:
                raise impossible(
                    "position.scaling",
                    "is dynamic, which scales all pairs except the first, but only one pair is rotated",
                    "Use another scaling, or rotate more features",
                )


class NoPositionSpec(Part):
    """No position encoding in this layer, only the causal mask (NoPE). Source: Kazemnejad et al. 2023, 2305.19466."""

    kind: Literal["none"] = "none"


class RelativePositionSpec(Part):
    """Relative position logits: each score gets a bias by the distance of its key, which depends on the query too.

    A token's input is projected to `dim` features per head, which weight as many learned profiles over the distances
    0 to `extent - 1`, shared by all heads; beyond them the bias is 0. With `l2_clip` these features are multiplied by a
    learned scale, then shortened to that L2 norm if they are longer. Source: Shaw et al. 2018, arXiv 1803.02155;
    as profiles: Thinking Machines 2026 (Inkling, the code in transformers).
    """

    dim: PositiveInt = 16
    extent: PositiveInt = 1024
    l2_clip: PositiveFloat | None = None


PositionSpec = Annotated[RoPESpec | NoPositionSpec, Field(discriminator="kind")]

# --- added to the embedding ------------------------------------------------------------------------------------------


class LearnedPositionsSpec(Part):
    """A learned vector for each of `max_length` positions, added to the embedding. Source: Gehring 2017, 1705.03122."""

    kind: Literal["learned"] = "learned"
    max_length: PositiveInt


class SinusoidalPositionsSpec(Part):
    """Sinusoidal position embeddings, added to the embedding. Source: Vaswani 2017, arXiv 1706.03762, section 3.5."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    base: Annotated[float, Field(gt=1)] = 10_000.0


EmbeddingPositionSpec = Annotated[LearnedPositionsSpec | SinusoidalPositionsSpec, Field(discriminator="kind")]
