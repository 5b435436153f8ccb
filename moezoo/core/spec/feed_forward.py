"""Feed-forward layers as data: dense ones, and what each expert is."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moezoo.core.spec.base import Part, default_kind


class GatedFeedForwardSpec(Part):
    """`(f(x w_gate) * (x w_up)) w_down` of width F. Source: Shazeer 2020, arXiv 2002.05202.

    f is silu (`swiglu`), gelu by its tanh form (`geglu`), or the square of relu (`relu_squared_glu`; the square: So et
    al. 2021, arXiv 2109.08668).
    """

    kind: Literal["swiglu", "geglu", "relu_squared_glu"] = "swiglu"
    hidden_dim: PositiveInt
    bias: bool = False


class ClampedSwiGLUSpec(Part):
    """SwiGLU with clamped branches: `gate * sigmoid(alpha gate) * (up + 1)`, gate <= limit, |up| <= limit.

    Source: OpenAI 2025 (gpt-oss), arXiv 2508.10925, section 2, and its released code.
    """

    kind: Literal["clamped_swiglu"] = "clamped_swiglu"
    hidden_dim: PositiveInt
    alpha: PositiveFloat = 1.702
    limit: PositiveFloat = 7.0
    bias: bool = True


class PlainFeedForwardSpec(Part):
    """`f(x w_up) w_down` of width F: relu, gelu by its tanh form (arXiv 1606.08415), or relu squared (2109.08668)."""

    kind: Literal["relu", "gelu", "relu_squared"]
    hidden_dim: PositiveInt
    bias: bool = False


FeedForwardSpec = Annotated[
    GatedFeedForwardSpec | ClampedSwiGLUSpec | PlainFeedForwardSpec,
    Field(discriminator="kind"),
    default_kind("swiglu"),
]
ExpertsSpec = FeedForwardSpec
