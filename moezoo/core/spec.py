"""The model as data: a frozen `ModelSpec`, made of parts that each belong to a closed, discriminated union.

Code dispatches on the *type* of a part, once, when a model is built. Sizes are named as in the house's dimension
alphabet: D `embed_dim`, N `num_heads`, M `num_kv_heads`, H `head_dim`, F `hidden_dim`, E `num_experts`, K `top_k`,
V `vocab_size`, L the number of layers.

A union of one member is written as an alias, so that its next member is one line here.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from moezoo.core.errors import SpecError


class Part(BaseModel):
    """Base of every spec and config section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def impossible(path: str, problem: str, advice: str) -> PydanticCustomError:
    """A combination of values that cannot be; `path` is relative to the part whose validator raises it."""
    return PydanticCustomError(
        "impossible", "{problem}. {advice}", {"path": path, "problem": problem, "advice": advice}
    )


# --- normalization ---------------------------------------------------------------------------------------------------


class RMSNormSpec(Part):
    """Root-mean-square norm with a learned scale. Source: Zhang and Sennrich 2019, arXiv 1910.07467."""

    kind: Literal["rms"] = "rms"
    epsilon: PositiveFloat = 1e-6


NormSpec = RMSNormSpec


# --- positions -------------------------------------------------------------------------------------------------------


class RoPESpec(Part):
    """Rotary position embedding, half-split layout. Source: Su et al. 2021, arXiv 2104.09864."""

    kind: Literal["rope"] = "rope"
    base: PositiveFloat = 10_000.0


class NoPositionSpec(Part):
    """No position information in this layer but the causal mask (NoPE). Source: Kazemnejad et al. 2023, 2305.19466."""

    kind: Literal["none"] = "none"


PositionSpec = Annotated[RoPESpec | NoPositionSpec, Field(discriminator="kind")]


# --- attention -------------------------------------------------------------------------------------------------------


class GroupedQueryAttentionSpec(Part):
    """Causal attention whose N query heads share M key/value heads. Source: Ainslie et al. 2023, arXiv 2305.13245.

    M = N is multi-head attention, M = 1 is multi-query attention. `qk_norm` normalizes each query and key head before
    the rotation (Henry et al. 2020, arXiv 2010.04245, with RMSNorm).
    """

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    position: PositionSpec = RoPESpec()
    qk_norm: NormSpec | None = None
    qkv_bias: bool = False
    output_bias: bool = False

    @model_validator(mode="after")
    def _sizes(self) -> "GroupedQueryAttentionSpec":
        if self.num_heads % self.num_kv_heads:
            raise impossible(
                "num_heads",
                f"is {self.num_heads}, which num_kv_heads = {self.num_kv_heads} does not divide",
                "Use a multiple of num_kv_heads",
            )
        if isinstance(self.position, RoPESpec) and self.head_dim % 2:
            raise impossible(
                "head_dim",
                f"is {self.head_dim}, but RoPE rotates pairs",
                "Use an even head_dim, or position: {kind: none}",
            )
        return self


AttentionSpec = GroupedQueryAttentionSpec


# --- feed-forward and experts ----------------------------------------------------------------------------------------


class SwiGLUSpec(Part):
    """Gated feed-forward `(silu(x w_gate) * (x w_up)) w_down` of width F. Source: Shazeer 2020, arXiv 2002.05202."""

    kind: Literal["swiglu"] = "swiglu"
    hidden_dim: PositiveInt


FeedForwardSpec = SwiGLUSpec
ExpertsSpec = SwiGLUSpec


# --- mixture of experts ----------------------------------------------------------------------------------------------


class RouterSpec(Part):
    """Who chooses K of E experts for a token, and how the choice is weighted; a point in the router algebra.

    `renormalize: sum` divides the K chosen scores by `their sum + renormalize_epsilon`. `dtype` is the dtype of the
    router's product: `float32` whatever the model computes in (Zoph et al. 2022, arXiv 2202.08906), or `compute`.
    """

    top_k: PositiveInt
    score: Literal["softmax"] = "softmax"
    renormalize: Literal["none", "sum"] = "sum"
    renormalize_epsilon: Annotated[float, Field(ge=0)] = 0.0
    dtype: Literal["float32", "compute"] = "float32"


class DroplessSpec(Part):
    """Every chosen expert computes every token routed to it. Source: Gale et al. 2022, arXiv 2211.15841."""

    kind: Literal["dropless"] = "dropless"


class CapacitySpec(Part):
    """Each expert counts for at most `ceil(factor * P * K / E)` of the P tokens of a forward pass, the earliest first.

    Later ones are dropped: their combine weight is zero, and the residual carries the token on (no work is saved).
    Source: Fedus et al. 2021, arXiv 2101.03961, section 2.2. Generation is dropless, so that a token's text does not
    depend on its neighbours in the batch.
    """

    kind: Literal["capacity"] = "capacity"
    factor: PositiveFloat


DispatchSpec = Annotated[DroplessSpec | CapacitySpec, Field(discriminator="kind")]


class SummedSharedExpertsSpec(Part):
    """Experts that every token passes through, added to the routed ones. Source: Dai et al. 2024, arXiv 2401.06066.

    The sum of `num_experts` SwiGLU experts of width `hidden_dim` is one SwiGLU of width `num_experts * hidden_dim`,
    and is stored and computed as that.
    """

    kind: Literal["sum"] = "sum"
    num_experts: PositiveInt = 1
    hidden_dim: PositiveInt

    @property
    def feed_forward(self) -> SwiGLUSpec:
        """The one feed-forward that equals the sum."""
        return SwiGLUSpec(hidden_dim=self.num_experts * self.hidden_dim)


SharedExpertsSpec = SummedSharedExpertsSpec


class SwitchBalanceLossSpec(Part):
    """Switch load-balancing loss of one layer, 1 when balanced. Source: Fedus et al. 2021, arXiv 2101.03961, eq. 4."""

    kind: Literal["switch_balance"] = "switch_balance"
    coefficient: Annotated[float, Field(ge=0)]


class RouterZLossSpec(Part):
    """Penalty on large router logits. Source: Zoph et al. 2022, arXiv 2202.08906, eq. 5."""

    kind: Literal["router_z"] = "router_z"
    coefficient: Annotated[float, Field(ge=0)]


AuxiliaryLossSpec = Annotated[SwitchBalanceLossSpec | RouterZLossSpec, Field(discriminator="kind")]


class MoESpec(Part):
    """A mixture-of-experts feed-forward: Router -> Dispatch -> Experts -> Combine, plus shared experts."""

    num_experts: PositiveInt
    router: RouterSpec
    experts: ExpertsSpec
    shared: SharedExpertsSpec | None = None
    dispatch: DispatchSpec = DroplessSpec()
    losses: tuple[AuxiliaryLossSpec, ...] = ()

    @model_validator(mode="after")
    def _sizes(self) -> "MoESpec":
        if self.router.renormalize == "none" and self.router.renormalize_epsilon:
            raise impossible(
                "router.renormalize_epsilon",
                f"is {self.router.renormalize_epsilon}, but renormalize is none",
                "Leave it out, or use renormalize: sum",
            )
        if self.router.top_k > self.num_experts:
            raise impossible(
                "router.top_k",
                f"is {self.router.top_k}, but num_experts is {self.num_experts}",
                f"Use top_k <= {self.num_experts}",
            )
        kinds = [loss.kind for loss in self.losses]
        if len(set(kinds)) < len(kinds):
            raise impossible(
                "losses",
                f"names a loss twice: {', '.join(kinds)}",
                "Use each loss once, with one coefficient",
            )
        return self


# --- the model -------------------------------------------------------------------------------------------------------


class LayerSpec(Part):
    """One pre-norm transformer layer, or `repeat` equal ones: attention, then a dense feed-forward or a MoE."""

    repeat: PositiveInt = 1
    attention: AttentionSpec
    feed_forward: FeedForwardSpec | None = None
    moe: MoESpec | None = None

    @model_validator(mode="after")
    def _one_feed_forward(self) -> "LayerSpec":
        if (self.feed_forward is None) == (self.moe is None):
            both = "both feed_forward and moe" if self.moe is not None else "neither feed_forward nor moe"
            raise impossible("", f"has {both}", "Give exactly one of feed_forward (dense) and moe")
        return self


class TiedHeadSpec(Part):
    """The output projection is the transposed embedding. Source: Press and Wolf 2016, arXiv 1608.05859."""

    kind: Literal["tied"] = "tied"


class UntiedHeadSpec(Part):
    """The output projection is a matrix of its own."""

    kind: Literal["untied"] = "untied"


HeadSpec = Annotated[TiedHeadSpec | UntiedHeadSpec, Field(discriminator="kind")]


class NormalInitializerSpec(Part):
    """Matrices drawn from N(0, std); scales are one, biases zero."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.02


class DepthScaledInitializerSpec(Part):
    """As `normal`, but projections that write into the residual stream use std / sqrt(2 L).

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    kind: Literal["depth_scaled"] = "depth_scaled"
    std: PositiveFloat = 0.02


InitializerSpec = Annotated[NormalInitializerSpec | DepthScaledInitializerSpec, Field(discriminator="kind")]


class PrecisionSpec(Part):
    """Dtype of activations and matrix products. Parameters are float32; `core/precision.py` lists the cast points."""

    compute: Literal["float32", "bfloat16"] = "float32"


class ModelSpec(Part):
    """A decoder-only language model. `vocab_size: null` in a config means: as many as the tokenizer has."""

    vocab_size: PositiveInt | None = None
    embed_dim: PositiveInt
    layers: tuple[LayerSpec, ...]
    norm: NormSpec = RMSNormSpec()
    head: HeadSpec = UntiedHeadSpec()
    initializer: InitializerSpec = DepthScaledInitializerSpec()
    precision: PrecisionSpec = PrecisionSpec()

    @model_validator(mode="after")
    def _some_layers(self) -> "ModelSpec":
        if not self.layers:
            raise impossible("layers", "is empty", "Give at least one layer")
        return self

    @property
    def all_layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in order, `repeat` written out: length L."""
        return tuple(layer for layer in self.layers for _ in range(layer.repeat))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a MoE."""
        return tuple(index for index, layer in enumerate(self.all_layers) if layer.moe is not None)

    @property
    def vocab(self) -> int:
        """V. Raises SpecError while `vocab_size` is null."""
        if self.vocab_size is None:
            raise SpecError(
                "model.vocab_size is null; expected a number once the model is built. Give it, or a tokenizer."
            )
        return self.vocab_size
