"""Position information as data: rotations inside attention, and vectors added to the embedding."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, impossible

# --- stretching a rotation to longer texts ---------------------------------------------------------------------------


class LinearScalingSpec(Part):
    """Every angle divided by `factor` (position interpolation). Source: Chen et al. 2023, arXiv 2306.15595."""

    kind: Literal["linear"] = "linear"
    factor: Annotated[float, Field(ge=1)]


class Llama3ScalingSpec(Part):
    """Slow pairs divided by `factor`, fast ones left, a ramp between. Source: Dubey 2024 (Llama 3), arXiv 2407.21783.

    A pair is slow where it turns less than `low_frequency_factor` times in `original_length` tokens, and fast where
    more than `high_frequency_factor` times. Where the two are equal (Llama-4) there is no ramp, and a pair between is
    fast.
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
                "Use a larger one",
            )
        return self


class YaRNScalingSpec(Part):
    """As `llama3` with a ramp over pairs, and sharper attention. Source: Peng et al. 2023, arXiv 2309.00071.

    Rotated features are multiplied by `attention_factor`; null: `m(mscale) / m(mscale_all_dim)` with
    `m(s) = 0.1 s ln(factor) + 1`, or m(1) where one of the two is null. `mscale_all_dim` also multiplies the scores of
    latent attention by `m(mscale_all_dim)^2` (DeepSeek-V2). The ramp runs from the pair that turns `beta_fast` times in
    `original_length` tokens to the one that turns `beta_slow` times; `truncate` rounds both outwards to whole pairs.
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
                "beta_fast", f"is {self.beta_fast}, below beta_slow = {self.beta_slow}", "Use a larger one"
            )
        return self


class LongRoPEScalingSpec(Part):
    """One divisor for each pair, from one of two lists. Source: Ding et al. 2024, arXiv 2402.13753 (Phi-3).

    The long list serves texts where `length > original_length`. Differs: `length` is a number of the spec, not that of
    the text at hand, so that a token's rotation does not change while a text grows past the original length.
    `attention_factor` multiplies rotated features; null: `sqrt(1 + ln(length / original) / ln(original))`, and 1 for
    short texts.
    """

    kind: Literal["longrope"] = "longrope"
    short_factors: tuple[PositiveFloat, ...]
    long_factors: tuple[PositiveFloat, ...]
    original_length: Annotated[int, Field(ge=2)]
    length: PositiveInt
    attention_factor: PositiveFloat | None = None


class DynamicScalingSpec(Part):
    """A larger base, so that the slowest pair alone is slowed down fully ("NTK-aware").

    Where `length > original_length`, the base of n rotated features is multiplied by
    `(factor * length / original_length - (factor - 1))^(n / (n - 2))`; else nothing changes. Source: bloc97 and
    emozilla 2023, in the form of transformers. Differs: `length` is a number of the spec, as in `longrope`.
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

    `layout`: pair i is features (i, i + n/2), `half_split`, or (2i, 2i + 1), `interleaved`, of the n rotated ones.
    `fraction` of a head is rotated, the rest carries no position: of its `features` the first n, which are paired
    among themselves and whose frequencies span the whole range; or of its `pairs` the first ones, as fast as where all
    turn (Gemma 4's proportional rotation).
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
                "fraction_of", "is pairs, but fraction is 1, and all turn", "Leave it out, or give a fraction"
            )
        return self

    @property
    def max_length(self) -> int | None:
        """The longest text that the scaling is made for; None where any length goes."""
        match self.scaling:
            case LongRoPEScalingSpec(length=length) | DynamicScalingSpec(length=length):
                return length
            case _:
                return None

    def rotated_dim(self, head_dim: int) -> int:
        """How many of a head's features form pairs; of `fraction_of: pairs` some of these stand still."""
        return head_dim if self.fraction_of == "pairs" else int(head_dim * self.fraction)

    def turning_pairs(self, head_dim: int) -> int:
        """How many pairs turn."""
        return int(self.fraction * head_dim // 2) if self.fraction_of == "pairs" else self.rotated_dim(head_dim) // 2

    def check(self, head_dim: int, path: str) -> None:
        """Raise where a head of this width cannot be rotated so; `path` of the width in the caller's part."""
        rotated = self.rotated_dim(head_dim)
        if rotated % 2 or self.turning_pairs(head_dim) == 0:
            shown = rotated if rotated % 2 else 0
            part = "" if shown == head_dim else f" and {shown} of its features are rotated (fraction {self.fraction})"
            raise impossible(
                path,
                f"is {head_dim}{part}, but RoPE rotates pairs",
                "Use an even number, or position: {kind: none}",
            )
        match self.scaling:
            case LongRoPEScalingSpec(short_factors=short, long_factors=long):
                if {len(short), len(long)} != {rotated // 2}:
                    raise impossible(
                        "position.scaling",
                        f"has {len(short)} short and {len(long)} long factors, but {rotated // 2} pairs are rotated",
                        "Give one of each for a pair",
                    )
            case DynamicScalingSpec() if rotated == 2:
                raise impossible(
                    "position.scaling",
                    "is dynamic, which slows down all pairs but the first, and only one is rotated",
                    "Use another scaling, or rotate more features",
                )


class NoPositionSpec(Part):
    """No position information in this layer but the causal mask (NoPE). Source: Kazemnejad et al. 2023, 2305.19466."""

    kind: Literal["none"] = "none"


PositionSpec = Annotated[RoPESpec | NoPositionSpec, Field(discriminator="kind")]

# --- added to the embedding ------------------------------------------------------------------------------------------


class LearnedPositionsSpec(Part):
    """A learned vector for each of `max_length` positions, added to the embedding. Source: Gehring 2017, 1705.03122."""

    kind: Literal["learned"] = "learned"
    max_length: PositiveInt


class SinusoidalPositionsSpec(Part):
    """Sines and cosines of falling frequency, added to the embedding. Source: Vaswani 2017, 1706.03762, 3.5."""

    kind: Literal["sinusoidal"] = "sinusoidal"
    base: Annotated[float, Field(gt=1)] = 10_000.0


EmbeddingPositionSpec = Annotated[LearnedPositionsSpec | SinusoidalPositionsSpec, Field(discriminator="kind")]
