"""The mixture of experts as data: Router -> Dispatch -> Experts -> Combine, plus shared experts."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, default_kind, impossible
from moezoo.core.spec.feed_forward import ExpertsSpec, FeedForwardSpec
from moezoo.core.spec.losses import (
    AuxiliaryLossSpec,
    CommunicationBalanceLossSpec,
    DeviceBalanceLossSpec,
    HeterogeneousBalanceLossSpec,
    LoadLossSpec,
)
from moezoo.core.spec.norms import NormSpec, RMSNormSpec
from moezoo.core.spec.routing import (
    ExpertChoiceSpec,
    GroupedTopKChoiceSpec,
    HashChoiceSpec,
    NoisyTopKChoiceSpec,
    RouterSpec,
    SparseMixerChoiceSpec,
    TopKChoiceSpec,
    TopPChoiceSpec,
)

# --- dispatch --------------------------------------------------------------------------------------------------------


class DroplessSpec(Part):
    """Every chosen expert computes every token routed to it. Source: Gale et al. 2022, arXiv 2211.15841."""

    kind: Literal["dropless"] = "dropless"


class CapacitySpec(Part):
    """Each expert computes at most `ceil(factor * P * K / E)` of the P tokens of a group.

    `group`: all tokens of a forward pass, which is one micro-batch (`batch`), or those of each sequence alone
    (`sequence`): then what is computed does not depend on how many sequences there are, nor on which device or process
    has the others. Source: Lepikhin et al. 2020, GShard, arXiv 2006.16668, section 2.2 (local group dispatching).

    `priority`: the earliest tokens (`position`; Fedus et al. 2021, arXiv 2101.03961, section 2.2) or those of the
    highest weight (`score`; Riquelme et al. 2021, V-MoE, arXiv 2106.05974, section 3.4: batch prioritized routing).
    Others are dropped: their combine weight is zero, and the residual carries the token on unchanged. Inference is
    dropless, so that a token's text does not depend on its neighbours in the batch.

    With zero-computation experts (MoE++) an expert with a feed-forward computes at most
    `ceil(factor * K * P * ffn_share / (ffn_share * E + Z))` and each of the Z others serves at most
    `ceil(factor * K * P / (ffn_share * E + Z))`. Source: Jin et al. 2024, arXiv 2410.07348, eq. 8, with T for K * P.
    """

    kind: Literal["capacity"] = "capacity"
    factor: PositiveFloat
    priority: Literal["position", "score"] = "position"
    group: Literal["batch", "sequence"] = "batch"


DispatchSpec = Annotated[DroplessSpec | CapacitySpec, Field(discriminator="kind")]

# --- experts that compute nothing ------------------------------------------------------------------------------------


class ZeroComputationSpec(Part):
    """Experts that cost (almost) nothing, behind the E others in the router's numbering: `zero` ones give nothing,
    `copy` ones give the token back, `constant` ones mix it with a learned vector: `a x + b v`, `[a, b] = softmax(x w)`.

    `ffn_share` is tau: the capacity and the weight in the balance loss of a zero-computation expert to those of one
    with a feed-forward are 1 to tau, and tau to 1. Source: Jin et al. 2024 (MoE++), arXiv 2410.07348, section 3.1-3.3.
    """

    num_zero: NonNegativeInt = 0
    num_copy: NonNegativeInt = 0
    num_constant: NonNegativeInt = 0
    ffn_share: Annotated[float, Field(gt=0, le=1)] = 0.75

    @property
    def num_experts(self) -> int:
        """Z, how many there are."""
        return self.num_zero + self.num_copy + self.num_constant

    @model_validator(mode="after")
    def _some(self) -> "ZeroComputationSpec":
        if self.num_experts == 0:
            raise impossible("", "names no expert", "Give num_zero, num_copy or num_constant, or leave it out")
        return self


# --- experts for every token -----------------------------------------------------------------------------------------


class SharedExpertsSpec(Part):
    """Experts that every token passes through, of the same kind as the routed ones. Source: Dai 2024, arXiv 2401.06066.

    Their sum is one feed-forward of width `num_experts * hidden_dim`, and is stored and computed as that. It is added
    to the routed experts' (`sum`), added after a sigmoid of one learned projection of the token (`sigmoid_gated`;
    Qwen1.5-MoE), or averaged with it (`average`; Cohere). `bias`: theirs, where only they have some (ERNIE 4.5 could);
    null: as the routed experts.
    """

    kind: Literal["sum", "sigmoid_gated", "average"] = "sum"
    num_experts: PositiveInt = 1
    hidden_dim: PositiveInt
    bias: bool | None = None


class ParallelFeedForwardSpec(Part):
    """A dense feed-forward beside the mixture, each with norms of its own before and behind (Gemma 4).

    `norm(feed_forward(layer_norm(x))) + norm(routed(norm(x)))`; the router sees x before any norm.
    """

    kind: Literal["parallel"] = "parallel"
    feed_forward: FeedForwardSpec
    norm: NormSpec = RMSNormSpec()


SharedSpec = Annotated[SharedExpertsSpec | ParallelFeedForwardSpec, Field(discriminator="kind"), default_kind("sum")]


# --- the mixture -----------------------------------------------------------------------------------------------------


class MoESpec(Part):
    """A mixture-of-experts feed-forward: Router -> Dispatch -> Experts -> Combine, plus shared experts.

    `latent_dim`: the routed experts work in a space of that width, between two shared projections (Nemotron-3).
    """

    num_experts: PositiveInt
    router: RouterSpec
    experts: ExpertsSpec
    latent_dim: PositiveInt | None = None
    zero_computation: ZeroComputationSpec | None = None
    shared: SharedSpec | None = None
    dispatch: DispatchSpec = DroplessSpec()
    losses: tuple[AuxiliaryLossSpec, ...] = ()

    @property
    def num_choices(self) -> int:
        """What the router scores: the E experts, and behind them those that compute nothing."""
        return self.num_experts + (self.zero_computation.num_experts if self.zero_computation else 0)

    @property
    def num_slots(self) -> int:
        """Experts a token can have at most, the K of `expert_PK`: top_k, or all of them where experts choose tokens."""
        return self.num_choices if isinstance(self.router.choice, ExpertChoiceSpec) else self.router.top_k

    @property
    def shared_feed_forward(self) -> FeedForwardSpec:
        """The one feed-forward that every token passes through; only where `shared` is not null."""
        match self.shared:
            case SharedExpertsSpec(num_experts=number, hidden_dim=width, bias=bias):
                bias = self.experts.bias if bias is None else bias
                return self.experts.model_copy(update={"hidden_dim": number * width, "bias": bias})
            case ParallelFeedForwardSpec(feed_forward=feed_forward):
                return feed_forward
            case None:
                raise ValueError("there are no shared experts")

    @property
    def inference_differs(self) -> bool:
        """Whether inference routes otherwise than training does without noise: see CapacitySpec, ExpertChoiceSpec."""
        return isinstance(self.dispatch, CapacitySpec) or isinstance(self.router.choice, ExpertChoiceSpec)

    @property
    def sequences_compete(self) -> bool:
        """Whether what becomes of a token depends on the other sequences of its batch: see `inference_differs`."""
        over_batch = isinstance(self.dispatch, CapacitySpec) and self.dispatch.group == "batch"
        return over_batch or isinstance(self.router.choice, ExpertChoiceSpec)

    @model_validator(mode="after")
    def _sizes(self) -> "MoESpec":
        if self.router.top_k > self.num_choices:
            known = "num_experts" if self.zero_computation is None else "num_experts with zero_computation"
            raise impossible(
                "router.top_k",
                f"is {self.router.top_k}, but {known} is {self.num_choices}",
                f"Use top_k <= {self.num_choices}",
            )
        kinds = [loss.kind for loss in self.losses]
        if len(set(kinds)) < len(kinds):
            raise impossible(
                "losses",
                f"names a loss twice: {', '.join(kinds)}",
                "Use each loss once, with one coefficient",
            )
        for check in (self._check_choice, self._check_zero_computation, self._check_losses):
            check()
        return self

    def _check_choice(self) -> None:
        router, choice = self.router, self.router.choice
        match choice:
            case GroupedTopKChoiceSpec():
                size, rest = divmod(self.num_choices, choice.num_groups)
                if rest:
                    raise impossible(
                        "router.choice.num_groups",
                        f"is {choice.num_groups}, which does not divide the {self.num_choices} experts",
                        "Use a divisor",
                    )
                if choice.keep > choice.num_groups:
                    raise impossible(
                        "router.choice.keep",
                        f"is {choice.keep}, but there are {choice.num_groups} groups",
                        "Use at most that",
                    )
                if router.top_k > choice.keep * size:
                    raise impossible(
                        "router.top_k",
                        f"is {router.top_k}, but the {choice.keep} kept groups have {choice.keep * size} experts",
                        "Use at most that, or keep more groups",
                    )
                if choice.group_value == "top2" and size < 2:
                    raise impossible(
                        "router.choice.group_value",
                        "is top2, but a group has one expert",
                        "Use fewer groups, or group_value: max",
                    )
            case ExpertChoiceSpec():
                self._refuse_with_expert_choice()
            case SparseMixerChoiceSpec():
                if router.top_k > 2 or router.renormalize != "none" or router.weight != "score":
                    raise impossible(
                        "router.choice",
                        "is sparsemixer, which makes its own weights for one or two experts",
                        "Use top_k: 1 or 2, renormalize: none and weight: score",
                    )
            case TopPChoiceSpec():
                if router.top_k == 1:
                    raise impossible(
                        "router.top_k",
                        "is 1, but choice top_p takes at most top_k experts, so p would decide nothing",
                        "Use top_k >= 2, or choice: {kind: top_k}",
                    )
            case HashChoiceSpec():
                useless = [loss.kind for loss in self.losses if loss.kind not in ("router_z", "importance")]
                if useless:
                    raise impossible(
                        "losses",
                        f"names {useless[0]}, but with choice hash the token ids decide, and no loss can move the load",
                        "Leave it out, or use choice: {kind: top_k}",
                    )
            case TopKChoiceSpec() | NoisyTopKChoiceSpec():
                pass
        if isinstance(choice, HashChoiceSpec | SparseMixerChoiceSpec) and router.selection_bias is not None:
            raise impossible(
                "router.selection_bias",
                f"is given, but choice {choice.kind} does not choose by a selection value",
                "Leave it out, or use choice: {kind: top_k}",
            )

    def _refuse_with_expert_choice(self) -> None:
        router = self.router
        if router.selection_bias is not None:
            raise impossible(
                "router.selection_bias",
                "is given, but with choice expert_choice all experts take equally many tokens; nothing is left",
                "Leave it out, or use choice: {kind: top_k}",
            )
        if router.renormalize != "none" or router.weight != "score":
            raise impossible(
                "router.renormalize",
                "needs a fixed number of experts a token, and with choice expert_choice a token may have none",
                "Use renormalize: none and weight: score",
            )
        if isinstance(self.dispatch, CapacitySpec):
            raise impossible(
                "dispatch",
                "is capacity, but with choice expert_choice each expert takes P * top_k / E tokens as it is",
                "Use dispatch: {kind: dropless}",
            )
        if self.zero_computation is not None:
            raise impossible(
                "zero_computation",
                "is given, but with choice expert_choice such an expert would have to take its share of tokens",
                "Leave it out, or use choice: {kind: top_k}",
            )
        useless = [loss.kind for loss in self.losses if loss.kind != "router_z"]
        if useless:
            raise impossible(
                "losses",
                f"names {useless[0]}, but with choice expert_choice every expert takes equally many tokens",
                "Leave it out",
            )

    def _check_zero_computation(self) -> None:
        if self.zero_computation is not None and self.router.apply_to == "input":
            raise impossible(
                "router.apply_to",
                "is input, but zero-computation experts have no input to weight",
                "Use apply_to: output",
            )

    def _check_losses(self) -> None:
        for index, loss in enumerate(self.losses):
            path = f"losses[{index}]"
            match loss:
                case DeviceBalanceLossSpec() | CommunicationBalanceLossSpec():
                    if self.num_choices % loss.num_devices:
                        raise impossible(
                            f"{path}.num_devices",
                            f"is {loss.num_devices}, which does not divide the {self.num_choices} experts",
                            "Use a divisor",
                        )
                    if isinstance(loss, CommunicationBalanceLossSpec) and loss.max_devices > loss.num_devices:
                        raise impossible(
                            f"{path}.max_devices",
                            f"is {loss.max_devices}, but there are {loss.num_devices} devices",
                            "Use at most that",
                        )
                case LoadLossSpec():
                    if not isinstance(self.router.choice, NoisyTopKChoiceSpec):
                        raise impossible(
                            path,
                            f"is load, which is made of routing noise, but choice is {self.router.choice.kind}",
                            "Use choice: {kind: noisy_top_k}, or another loss",
                        )
                    if self.router.selection_bias is not None:
                        raise impossible(
                            path,
                            "is load, the chance to be chosen by noisy logits, but router.selection_bias decides too",
                            "Leave one of the two out",
                        )
                    if self.router.top_k == self.num_choices:
                        raise impossible(
                            path,
                            f"is load, but with top_k {self.router.top_k} every expert gets every token",
                            "Leave it out, or use a smaller top_k",
                        )
                case HeterogeneousBalanceLossSpec():
                    if self.zero_computation is None:
                        raise impossible(
                            path,
                            "is heterogeneous_balance, but there are no zero-computation experts",
                            "Add zero_computation, or use switch_balance",
                        )
                case _:
                    pass
