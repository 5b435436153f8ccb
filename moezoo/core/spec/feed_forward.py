"""Feed-forward layers as data, used for dense layers and for experts."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moezoo.core.spec.base import Part, default_kind


class GatedFeedForwardSpec(Part):
    """Gated feed-forward of width F: `(f(x w_gate) * (x w_up)) w_down`. Source: Shazeer 2020, arXiv 2002.05202.

    f is SiLU (`swiglu`), GELU in its tanh approximation (`geglu`) or by erf (`exact_geglu`), ReLU (`reglu`), or squared
    ReLU (`relu_squared_glu`; So et al. 2021, arXiv 2109.08668). `limit` bounds both factors, f(gate) from above and up
    on both sides (StepFun 2026: Step 3.5); null: no bound.
    """

    kind: Literal["swiglu", "geglu", "exact_geglu", "reglu", "relu_squared_glu"] = "swiglu"
    hidden_dim: PositiveInt
    limit: PositiveFloat | None = None
    bias: bool = False


class ClampedSwiGLUSpec(Part):
    """SwiGLU with clamped inputs: `gate * sigmoid(alpha gate) * (up + up_offset)`, gate <= limit, |up| <= limit.

    Source: OpenAI 2025 (gpt-oss), arXiv 2508.10925, section 2, and its released code. With an alpha of 1 and an offset
    of 0 it is SwiGLU of clamped inputs (DeepSeek-V4).
    """

    kind: Literal["clamped_swiglu"] = "clamped_swiglu"
    hidden_dim: PositiveInt
    alpha: PositiveFloat = 1.702
    limit: PositiveFloat = 7.0
    up_offset: Annotated[float, Field(ge=0)] = 1.0
    bias: bool = True


class SoftcappedSwiGLUSpec(Part):
    """SwiGLU with bounded factors: `cap(gate, gate_softcap) * sigmoid(gate) * cap(up, up_softcap)`.

    `cap(x, c) = c tanh(x / c)`; the sigmoid sees the gate as it is. Source: Thinking Machines 2026 (Inkling 2, the code
    in transformers).
    """

    kind: Literal["softcapped_swiglu"] = "softcapped_swiglu"
    hidden_dim: PositiveInt
    gate_softcap: PositiveFloat = 4.0
    up_softcap: PositiveFloat = 25.0
    bias: bool = False


class PlainFeedForwardSpec(Part):
    """Ungated feed-forward of width F: `f(x w_up) w_down`.

    f is ReLU, GELU in its tanh approximation (arXiv 1606.08415), SiLU (arXiv 1702.03118), or squared ReLU (arXiv
    2109.08668).
    """

    kind: Literal["relu", "gelu", "silu", "relu_squared"]
    hidden_dim: PositiveInt
    bias: bool = False


FeedForwardSpec = Annotated[
    GatedFeedForwardSpec | ClampedSwiGLUSpec | SoftcappedSwiGLUSpec | PlainFeedForwardSpec,
    Field(discriminator="kind"),
    default_kind("swiglu"),
]
ExpertsSpec = FeedForwardSpec
