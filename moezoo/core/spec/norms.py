"""Normalization layers as data."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from moezoo.core.spec.base import Part, default_kind


class RMSNormSpec(Part):
    """Root-mean-square norm. Source: Zhang and Sennrich 2019, arXiv 1910.07467.

    `scale`: `learned` multiplies by a scale that starts at one; `zero_centred` by one plus a scale that starts at zero
    (Gemma, Qwen3-Next: weight decay, where applied, then pulls it towards one); `none` has no parameter.
    """

    kind: Literal["rms"] = "rms"
    epsilon: PositiveFloat = 1e-6
    scale: Literal["learned", "zero_centred", "none"] = "learned"


class LayerNormSpec(Part):
    """Layer norm with a learned scale and an optional bias. Source: Ba et al. 2016, arXiv 1607.06450."""

    kind: Literal["layer"] = "layer"
    epsilon: PositiveFloat = 1e-5
    bias: bool = True


NormSpec = Annotated[RMSNormSpec | LayerNormSpec, Field(discriminator="kind"), default_kind("rms")]
