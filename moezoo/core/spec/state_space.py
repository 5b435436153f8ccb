"""State-space layers as data: mixers that replace attention in a layer."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, impossible
from moezoo.core.spec.norms import NormSpec, RMSNormSpec


class Mamba2Spec(Part):
    """Mamba-2: a state-space layer with a scalar decay per head. Source: Dao and Gu 2024, arXiv 2405.21060.

    Each of `num_heads` heads has a state of `state_dim x head_dim` numbers. A token decays it, by a rate times the
    token's step, adds its value there, times the step, and reads it. `num_groups` groups of heads share the vectors
    that say where to add and where to read (B and C of the paper). Causal convolutions over `conv_width` tokens, the
    current one included, follow the projections of values and of those vectors; `conv_bias`: they have biases. Steps
    are clipped to [`min_step`, `max_step`]. The heads' output is gated, then normalized over the features of a group,
    with `norm_epsilon`. `bias`: the projections from and to the model width have biases.
    """

    kind: Literal["mamba2"] = "mamba2"
    num_heads: PositiveInt
    head_dim: PositiveInt
    state_dim: PositiveInt
    num_groups: PositiveInt = 1
    conv_width: Annotated[int, Field(ge=2)] = 4
    conv_bias: bool = True
    bias: bool = False
    min_step: NonNegativeFloat = 0.0
    max_step: PositiveFloat | None = None
    norm_epsilon: PositiveFloat = 1e-5

    @model_validator(mode="after")
    def _sizes(self) -> "Mamba2Spec":
        if self.num_heads % self.num_groups:
            raise impossible(
                "num_heads",
                f"is {self.num_heads}, which is not divisible by num_groups = {self.num_groups}",
                "Use a multiple of num_groups",
            )
        if self.max_step is not None and self.max_step <= self.min_step:
            raise impossible(
                "max_step", f"is {self.max_step:g}, but min_step is {self.min_step:g}", "Use max_step > min_step"
            )
        return self


class MambaSpec(Part):
    """Mamba-1: a selective state-space layer. Source: Gu and Dao 2023, arXiv 2312.00752.

    Each of `inner_dim` channels has a state of `state_dim` numbers, each with a decay rate of its own. A causal
    convolution over `conv_width` tokens, the current one included, precedes it (`conv_bias`: with a bias). From the
    convolved channels are projected each token's steps (through `step_rank` features), and the vectors that say where
    to add and where to read. `norm` normalizes these three (Jamba, arXiv 2403.19887); null: no norm. `bias`: the
    projections from and to the model width have biases.
    """

    kind: Literal["mamba"] = "mamba"
    inner_dim: PositiveInt
    state_dim: PositiveInt = 16
    step_rank: PositiveInt
    conv_width: Annotated[int, Field(ge=2)] = 4
    conv_bias: bool = True
    bias: bool = False
    norm: NormSpec | None = None


class LightningAttentionSpec(Part):
    """Lightning attention: linear attention whose states decay at fixed rates. Source: Qin et al. 2024, 2405.17381.

    Each of `num_heads` heads has a state of `head_dim x head_dim` numbers. A token decays it, adds the product of its
    key and value, and reads it with its query; silu follows the three projections. Rates are not trained: those of the
    heads are a geometric series from 2^(-8/N) to 1/256, times `decay_scale`, which falls with depth (MiniMax-01, arXiv
    2501.08313). `norm` is over the features of all heads; a sigmoid gate of the layer's input follows it.
    """

    kind: Literal["lightning"] = "lightning"
    num_heads: PositiveInt
    head_dim: PositiveInt
    decay_scale: NonNegativeFloat = 1.0
    norm: NormSpec = RMSNormSpec()
