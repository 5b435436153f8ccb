"""The residual stream as data: what blocks read from it, and how it takes up what they add."""

from typing import Annotated, Literal

from pydantic import Field

from moezoo.core.spec.base import Part, default_kind


class SumResidualSpec(Part):
    """One stream, to which each block adds its output: `x + f(x)`. Source: He et al. 2015, arXiv 1512.03385."""

    kind: Literal["sum"] = "sum"


class DepthScaledResidualSpec(Part):
    """One stream that keeps its variance: block i, counted from 2, makes `x sqrt(1 - 1 / i) + f(x) sqrt(1 / i)` of x.

    Block 2 is the attention of the first layer, so the stream is the sum of its i terms, the embedding among them, over
    sqrt(i). Source: Reflection AI 2026 (Beam; transformers 5.23, `depth_scaled_residual_add`).
    """

    kind: Literal["depth_scaled"] = "depth_scaled"


ResidualSpec = Annotated[SumResidualSpec | DepthScaledResidualSpec, Field(discriminator="kind"), default_kind("sum")]
