"""The output projection as data."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from moezoo.core.spec.base import Part


class TiedHeadSpec(Part):
    """Output projection tied to the embedding (its transpose). Source: Press and Wolf 2016, arXiv 1608.05859.

    `bias`: the output projection has its own bias. `unused`: number of ids at the end of the vocabulary that stand for
    no token, but make its matrices of a rounder size: they have no logits.
    """

    kind: Literal["tied"] = "tied"
    bias: bool = False
    unused: NonNegativeInt = 0


class UntiedHeadSpec(Part):
    """Output projection with its own matrix and an optional bias (Phi-3.5-MoE has one); `unused` as of a tied head."""

    kind: Literal["untied"] = "untied"
    bias: bool = False
    unused: NonNegativeInt = 0


HeadSpec = Annotated[TiedHeadSpec | UntiedHeadSpec, Field(discriminator="kind")]
