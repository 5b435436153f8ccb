"""MoE layers as data: Router -> Dispatch -> Experts -> Combine, plus shared experts."""

from math import isqrt
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, impossible
from moezoo.core.spec.feed_forward import ExpertsSpec, FeedForwardSpec, GatedFeedForwardSpec
from moezoo.core.spec.losses import (
    AuxiliaryLossSpec,
    CommunicationBalanceLossSpec,
    DeviceBalanceLossSpec,
    HeterogeneousBalanceLossSpec,
    LoadLossSpec,
)
from moezoo.core.spec.norms import NormSpec
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
from moezoo.core.spec.shared_experts import ParallelFeedForwardSpec, SharedExpertsSpec, SharedSpec

# --- dispatch --------------------------------------------------------------------------------------------------------


class DroplessSpec(Part):
    """Dropless dispatch: each expert computes every token routed to it. Source: Gale et al. 2022, arXiv 2211.15841."""

    kind: Literal["dropless"] = "dropless"


class CapacitySpec(Part):
    """Capacity factor: each expert computes at most `ceil(factor * P * K / E)` of the P tokens of a group.

    `group`: capacity per batch or per sequence. `batch`: all tokens of a forward pass, which is one micro-batch.
    `sequence`: the tokens of one sequence, so that the result depends neither on the number of sequences nor on the
    device or process that holds the others. Source: Lepikhin et al. 2020, GShard, arXiv 2006.16668, section 2.2 (local
    group dispatching).

    `priority`: an expert keeps the earliest tokens (`position`; Fedus et al. 2021, arXiv 2101.03961, section 2.2) or
    those with the highest weight (`score`; Riquelme et al. 2021, V-MoE, arXiv 2106.05974, section 3.4: batch
    prioritized routing). The other tokens are dropped: their combine weight is zero, and the residual connection passes
    them on unchanged. Inference is dropless, so that generated text does not depend on the other sequences in the
    batch.

    With zero-computation experts (MoE++) an expert with a feed-forward computes at most
    `ceil(factor * K * P * ffn_share / (ffn_share * E + Z))` tokens and each of the Z others takes at most
    `ceil(factor * K * P / (ffn_share * E + Z))`. Source: Jin et al. 2024, arXiv 2410.07348, eq. 8, with T for K * P.
    """

    kind: Literal["capacity"] = "capacity"
    factor: PositiveFloat
    priority: Literal["position", "score"] = "position"
    group: Literal["batch", "sequence"] = "batch"


DispatchSpec = Annotated[DroplessSpec | CapacitySpec, Field(discriminator="kind")]

# --- zero-computation experts ----------------------------------------------------------------------------------------


class ZeroComputationSpec(Part):
    """Zero-computation experts, numbered after the E experts with a feed-forward.

    `zero` experts return zeros, `copy` experts return the token, `constant` experts mix it with a learned vector:
    `a x + b v`, `[a, b] = softmax(x w)`. `ffn_share` is tau: relative to an expert with a feed-forward, a
    zero-computation expert has 1 / tau times the capacity and tau times the weight in the balance loss. Source: Jin et
    al. 2024 (MoE++), arXiv 2410.07348, section 3.1-3.3.
    """

    num_zero: NonNegativeInt = 0
    num_copy: NonNegativeInt = 0
    num_constant: NonNegativeInt = 0
    ffn_share: Annotated[float, Field(gt=0, le=1)] = 0.75

    @property
    def num_experts(self) -> int:
        """Z, the number of zero-computation experts."""
        return self.num_zero + self.num_copy + self.num_constant

    @model_validator(mode="after")
    def _some(self) -> "ZeroComputationSpec":
        if self.num_experts == 0:
            raise impossible("", "has no experts", "Set num_zero, num_copy or num_constant, or remove it")
        return self


# --- the MoE layer ---------------------------------------------------------------------------------------------------


class MoESpec(Part):
    """MoE layer (mixture-of-experts feed-forward): Router -> Dispatch -> Experts -> Combine, plus shared experts.

    `num_experts`: at most 2**20, as in He 2024, arXiv 2407.04153 (a million experts). `latent_dim`: the routed experts
    run at this width, between two shared projections (Nemotron-3); `latent_bias`: the first of them has a bias.
    `output_norm` normalizes the layer's output, the sum of routed and shared experts (A.X-K1); null: none.
    `output_bias`: a bias is added to it (JetMoE).
    """

    num_experts: Annotated[int, Field(ge=1, le=1 << 20)]
    router: RouterSpec
    experts: ExpertsSpec
    latent_dim: PositiveInt | None = None
    latent_bias: bool = False
    zero_computation: ZeroComputationSpec | None = None
    shared: SharedSpec | None = None
    output_norm: NormSpec | None = None
    output_bias: bool = False
    dispatch: DispatchSpec = DroplessSpec()
    losses: tuple[AuxiliaryLossSpec, ...] = ()

    @property
    def num_choices(self) -> int:
        """Number of experts the router scores: the E experts, then the zero-computation experts."""
        return self.num_experts + (self.zero_computation.num_experts if self.zero_computation else 0)

    @property
    def num_router_outputs(self) -> int:
        """Number of outputs of the router's matrix: one per choice, or 2 sqrt(E) with product keys."""
        return 2 * isqrt(self.num_choices) if self.router.product_keys else self.num_choices

    @property
    def num_slots(self) -> int:
        """Maximum number of experts per token, the K of `expert_PK`: top_k, or all experts with expert choice."""
        return self.num_choices if isinstance(self.router.choice, ExpertChoiceSpec) else self.router.top_k

    @property
    def num_sinks(self) -> int:
        """Number of shared experts that the router scores."""
        return (
            self.shared.num_experts if isinstance(self.shared, SharedExpertsSpec) and self.shared.kind == "sink" else 0
        )

    @property
    def shared_feed_forward(self) -> FeedForwardSpec:
        """The dense feed-forward computed for every token. Raises ValueError if `shared` is null."""
        match self.shared:
            case SharedExpertsSpec(num_experts=number, hidden_dim=width, bias=bias, activation=activation, limit=limit):
                bias = self.experts.bias if bias is None else bias
                if activation is not None:
                    return GatedFeedForwardSpec(kind=activation, hidden_dim=number * width, limit=limit, bias=bias)
                return self.experts.model_copy(update={"hidden_dim": number * width, "bias": bias})
            case ParallelFeedForwardSpec(feed_forward=feed_forward):
                return feed_forward
            case None:
                raise ValueError("there are no shared experts")

    @property
    def inference_differs(self) -> bool:
        """True if routing at inference differs from noiseless training: see CapacitySpec, ExpertChoiceSpec."""
        return isinstance(self.dispatch, CapacitySpec) or isinstance(self.router.choice, ExpertChoiceSpec)

    @property
    def sequences_compete(self) -> bool:
        """True if the routing of a token in training depends on the other sequences of its batch."""
        over_batch = isinstance(self.dispatch, CapacitySpec) and self.dispatch.group == "batch"
        return over_batch or isinstance(self.router.choice, ExpertChoiceSpec)

    @property
    def router_learns(self) -> bool:
        """False if every combine weight is the constant `scale`: the cross-entropy has no gradient for such a router.

        So it is for one expert per token whose weight is divided by itself (`renormalize`), or is the softmax of one
        logit (`softmax_of_chosen`). An epsilon below 1e-3 in the divisor leaves less than a thousandth of the gradient.
        With a single expert there is nothing to learn, and the answer is True.
        """
        router, choice = self.router, self.router.choice
        # The highest of E probabilities is at least 1 / E, which is p already.
        reaches_p = isinstance(choice, TopPChoiceSpec) and router.score == "softmax" and router.selection_bias is None
        one_of_p = isinstance(choice, TopPChoiceSpec) and reaches_p and choice.p * self.num_choices <= 1
        divided = router.renormalize != "none" and router.renormalize_epsilon < 1e-3 and not self.num_sinks
        constant = divided or router.weight == "softmax_of_chosen"  # neither can be set with sparsemixer, expert_choice
        return self.num_choices == 1 or not ((router.top_k == 1 or one_of_p) and constant)

    @model_validator(mode="after")
    def _sizes(self) -> "MoESpec":
        if self.router.top_k > self.num_choices:
            known = "num_experts" if self.zero_computation is None else "num_experts with zero_computation"
            raise impossible(
                "router.top_k",
                f"is {self.router.top_k}, but {known} is {self.num_choices}",
                f"Use top_k <= {self.num_choices}",
            )
        if self.latent_bias and self.latent_dim is None:
            raise impossible("latent_bias", "is true, but latent_dim is null", "Set latent_dim, or remove it")
        kinds = [loss.kind for loss in self.losses]
        if len(set(kinds)) < len(kinds):
            raise impossible(
                "losses",
                f"has a duplicate: {', '.join(kinds)}",
                "Use each loss once, with one coefficient",
            )
        root = isqrt(self.num_choices)
        if self.router.product_keys and root**2 != self.num_choices:
            raise impossible(
                "router.product_keys",
                f"is true, but {self.num_choices} experts are not all pairs of two equally large sets of keys",
                f"Use {root**2} or {(root + 1) ** 2} experts",
            )
        for check in (self._check_choice, self._check_zero_computation, self._check_losses, self._check_sinks):
            check()
        return self

    def _check_choice(self) -> None:
        router, choice = self.router, self.router.choice
        match choice:
            case GroupedTopKChoiceSpec():
                self._check_groups(choice)
            case ExpertChoiceSpec():
                self._refuse_with_expert_choice()
            case SparseMixerChoiceSpec():
                if router.top_k > 2 or router.renormalize != "none" or router.weight != "score":
                    raise impossible(
                        "router.choice",
                        "is sparsemixer, which computes its own weights for one or two experts",
                        "Use top_k: 1 or 2, renormalize: none and weight: score",
                    )
            case TopPChoiceSpec():
                if router.top_k == 1:
                    raise impossible(
                        "router.top_k",
                        "is 1, but choice top_p takes at most top_k experts, so p would have no effect",
                        "Use top_k >= 2, or choice: {kind: top_k}",
                    )
            case HashChoiceSpec():
                useless = [loss.kind for loss in self.losses if loss.kind not in ("router_z", "importance")]
                if useless:
                    raise impossible(
                        "losses",
                        f"has {useless[0]}, but with choice hash the token ids alone determine the load",
                        "Remove it, or use choice: {kind: top_k}",
                    )
            case TopKChoiceSpec() | NoisyTopKChoiceSpec():
                pass
        if isinstance(choice, HashChoiceSpec | SparseMixerChoiceSpec) and router.selection_bias is not None:
            raise impossible(
                "router.selection_bias",
                f"is set, but choice {choice.kind} does not use a selection value",
                "Remove it, or use choice: {kind: top_k}",
            )

    def _check_groups(self, choice: GroupedTopKChoiceSpec) -> None:
        size, rest = divmod(self.num_choices, choice.num_groups)
        if rest:
            raise impossible(
                "router.choice.num_groups",
                f"is {choice.num_groups}, which does not divide the number of experts {self.num_choices}",
                f"Use a divisor of {self.num_choices}",
            )
        if choice.keep > choice.num_groups:
            raise impossible(
                "router.choice.keep",
                f"is {choice.keep}, but num_groups is {choice.num_groups}",
                f"Use keep <= {choice.num_groups}",
            )
        if choice.others == "never" and self.router.top_k > choice.keep * size:
            raise impossible(
                "router.top_k",
                f"is {self.router.top_k}, but the {choice.keep} kept groups have {choice.keep * size} experts",
                f"Use top_k <= {choice.keep * size}, or a larger keep",
            )
        if choice.group_value == "top2" and size < 2:
            raise impossible(
                "router.choice.group_value",
                "is top2, but each group has only one expert",
                "Use fewer groups, or group_value: max",
            )

    def _refuse_with_expert_choice(self) -> None:
        router = self.router
        if router.selection_bias is not None:
            raise impossible(
                "router.selection_bias",
                "is set, but with choice expert_choice the load is always balanced",
                "Remove it, or use choice: {kind: top_k}",
            )
        if router.renormalize != "none" or router.weight != "score":
            raise impossible(
                "router.renormalize",
                "requires a fixed number of experts per token, but with choice expert_choice a token may have none",
                "Use renormalize: none and weight: score",
            )
        if isinstance(self.dispatch, CapacitySpec):
            raise impossible(
                "dispatch",
                "is capacity, but with choice expert_choice each expert already takes exactly P * top_k / E tokens",
                "Use dispatch: {kind: dropless}",
            )
        if self.zero_computation is not None:
            raise impossible(
                "zero_computation",
                "is set, but with choice expert_choice each such expert would have to take its share of tokens",
                "Remove it, or use choice: {kind: top_k}",
            )
        useless = [loss.kind for loss in self.losses if loss.kind != "router_z"]
        if useless:
            raise impossible(
                "losses",
                f"has {useless[0]}, but with choice expert_choice every expert takes equally many tokens",
                "Remove it",
            )

    def _check_sinks(self) -> None:
        if not self.num_sinks:
            return
        router = self.router
        if router.score not in ("sigmoid", "sqrt_softplus") or router.weight != "score" or router.renormalize != "sum":
            raise impossible(
                "shared",
                "is sink, whose scores take part in the renormalization of the experts' own",
                "Use score: sigmoid or sqrt_softplus, weight: score and renormalize: sum in router",
            )
        if self.shared_feed_forward.bias:
            raise impossible(
                "shared.bias",
                "is true, but with kind sink each shared expert has a weight, and biases are shared",
                "Use bias: false",
            )

    def _check_zero_computation(self) -> None:
        if self.zero_computation is not None and self.router.apply_to == "input":
            raise impossible(
                "router.apply_to",
                "is input, but zero-computation experts have no input to multiply by the weight",
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
                            f"is {loss.num_devices}, which does not divide the number of experts {self.num_choices}",
                            f"Use a divisor of {self.num_choices}",
                        )
                    if isinstance(loss, CommunicationBalanceLossSpec) and loss.max_devices > loss.num_devices:
                        raise impossible(
                            f"{path}.max_devices",
                            f"is {loss.max_devices}, but num_devices is {loss.num_devices}",
                            f"Use max_devices <= {loss.num_devices}",
                        )
                case LoadLossSpec():
                    if not isinstance(self.router.choice, NoisyTopKChoiceSpec):
                        raise impossible(
                            path,
                            f"is load, which requires routing noise, but choice is {self.router.choice.kind}",
                            "Use choice: {kind: noisy_top_k}, or another loss",
                        )
                    if self.router.selection_bias is not None:
                        raise impossible(
                            path,
                            "is load, which assumes a choice by noisy logits alone, but router.selection_bias is set",
                            "Remove one of the two",
                        )
                    if self.router.top_k == self.num_choices:
                        raise impossible(
                            path,
                            f"is load, but with top_k {self.router.top_k} every expert gets every token",
                            "Remove it, or use a smaller top_k",
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
