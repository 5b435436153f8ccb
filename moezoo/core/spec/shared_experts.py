"""Shared experts and the like as data: what an MoE layer computes for every token."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, default_kind, impossible
from moezoo.core.spec.feed_forward import FeedForwardSpec
from moezoo.core.spec.norms import NormSpec, RMSNormSpec


class SharedExpertsSpec(Part):
    """Shared experts, of the same kind as the routed ones, computed for every token. Source: Dai 2024, 2401.06066.

    Their sum equals one feed-forward of width `num_experts * hidden_dim`, and is stored and computed as such. It is
    added to the routed experts' output (`sum`), added after multiplication by the sigmoid of a learned projection of
    the token (`sigmoid_gated`; Qwen1.5-MoE), or averaged with it (`average`; Cohere). `sink`: the router scores the
    shared experts too, their scores take part in the renormalization of the weights, and each is multiplied by its
    weight: what a token does not need of the routed experts goes to the shared ones (Thinking Machines 2026: Inkling,
    the code in transformers). `bias`: set where the shared experts differ from the routed ones (possible in ERNIE 4.5);
    null: as the routed experts; likewise `activation`, where only the routed ones are clamped (HY-V4), or always have
    SiLU (Aria), and with it the bound of its factors, `limit` (Step 3.5).
    """

    kind: Literal["sum", "sigmoid_gated", "average", "sink"] = "sum"
    num_experts: PositiveInt = 1
    hidden_dim: PositiveInt
    bias: bool | None = None
    activation: Literal["swiglu", "geglu", "exact_geglu", "reglu", "relu_squared_glu"] | None = None
    limit: PositiveFloat | None = None

    @model_validator(mode="after")
    def _limited(self) -> "SharedExpertsSpec":
        if self.limit is not None and self.activation is None:
            raise impossible(
                "limit",
                f"is {self.limit:g}, but the activation is that of the routed experts",
                "Set activation: swiglu, or the limit of experts",
            )
        return self


class ParallelFeedForwardSpec(Part):
    """Dense feed-forward in parallel with the routed experts, each with its own pre- and post-norm (Gemma 4).

    `norm(feed_forward(layer_norm(x))) + norm(routed(norm(x)))`; the router sees x before any norm.
    """

    kind: Literal["parallel"] = "parallel"
    feed_forward: FeedForwardSpec
    norm: NormSpec = RMSNormSpec()


SharedSpec = Annotated[SharedExpertsSpec | ParallelFeedForwardSpec, Field(discriminator="kind"), default_kind("sum")]
