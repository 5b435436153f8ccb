"""The router as data: a point in the algebra `input -> logits -> score -> choice -> weight`.

What a published family does is a combination of these fields, and needs no code of its own (writings/routing.md).
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, default_kind, impossible

# --- choice: who computes a token ------------------------------------------------------------------------------------


class TopKChoiceSpec(Part):
    """The K experts of the highest selection value. Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3 and 5."""

    kind: Literal["top_k"] = "top_k"


class GroupedTopKChoiceSpec(Part):
    """Top-k among the experts of the `keep` best of `num_groups` groups of consecutive experts.

    `group_value` of a group: its `max` (DeepSeek-V2, arXiv 2405.04434, section 2.2.2: device-limited routing) or the
    sum of its `top2` (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Experts of other groups are out, whatever their
    value (a mask of minus infinity, not zero).
    """

    kind: Literal["grouped_top_k"] = "grouped_top_k"
    num_groups: PositiveInt
    keep: PositiveInt
    group_value: Literal["max", "top2"] = "max"


class NoisyTopKChoiceSpec(Part):
    """Top-k of logits plus normal noise of a learned size, in training: `logit + normal() * softplus(x w_noise)`.

    The scores, and so the weights, are made of the noisy logits. Without noise (inference) it is top-k. Source: Shazeer
    et al. 2017, arXiv 1701.06538, eq. 3-5.
    """

    kind: Literal["noisy_top_k"] = "noisy_top_k"


class SparseMixerChoiceSpec(Part):
    """SparseMixer-v2: one or two experts, each drawn in training from a softmax over the logits near the best one.

    Near: within `2 * jitter` of the best, as a share of `max(|logit|, best)`. The weight is the drawn expert's share of
    that softmax. If it is not the most probable one, its weight is divided by 3 three times out of four, while the
    gradient stays that of the undivided weight: Heun's third-order estimate of what the choice was worth. The second
    expert is drawn in the same way from what is left. Inference takes the best. The selection value plays no part.

    Source: Liu et al. 2024 (GRIN), arXiv 2409.12136; the released code of Phi-3.5-MoE (transformers, `phimoe`).
    """

    kind: Literal["sparsemixer"] = "sparsemixer"
    jitter: PositiveFloat = 0.01


class TopPChoiceSpec(Part):
    """The fewest experts, best first, whose scores sum to at least `p`, and never more than top_k.

    The expert with which the sum reaches p is among them. Source: Huang et al. 2024, arXiv 2403.07652, top-p routing.
    Differs: the bound top_k, so that shapes are static.
    """

    kind: Literal["top_p"] = "top_p"
    p: Annotated[float, Field(gt=0, lt=1)]


class HashChoiceSpec(Part):
    """K different experts by a fixed table over token ids, drawn from the seed; each is first for equally many ids.

    Weights are still the router's. Source: Roller et al. 2021, arXiv 2106.04426 (random hash). Differs: their balanced
    table counts how often an id occurs; ours only ids.
    """

    kind: Literal["hash"] = "hash"


class ExpertChoiceSpec(Part):
    """In training each expert takes the `C = ceil(P * top_k / E)` tokens of the highest score, ties to the earlier.

    So top_k is the mean number of experts a token has, and one token may have all E or none. That looks at later tokens
    and at other sequences. So training keeps for each expert a moving average (`decay` a step) of its cutoff, the
    lowest score that it took, and at inference a token goes to every expert whose cutoff its score reaches.
    Source: Zhou et al. 2022, arXiv 2202.09368, section 3.2; moving averages of cutoffs: Sun et al. 2026, arXiv
    2603.11535, who choose by them in training as well.
    """

    kind: Literal["expert_choice"] = "expert_choice"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99


ChoiceSpec = Annotated[
    TopKChoiceSpec
    | GroupedTopKChoiceSpec
    | NoisyTopKChoiceSpec
    | SparseMixerChoiceSpec
    | TopPChoiceSpec
    | HashChoiceSpec
    | ExpertChoiceSpec,
    Field(discriminator="kind"),
    default_kind("top_k"),
]

# --- the router ------------------------------------------------------------------------------------------------------


class SelectionBiasSpec(Part):
    """A bias on the selection value only, trained without a loss: after each step `+ rate` for experts with less than
    the mean load of the whole step, `- rate` for those with more. Source: Wang et al. 2024, arXiv 2408.15664;
    DeepSeek-V3, arXiv 2412.19437, section 2.1.2. A rate of 0 keeps it as it is loaded.
    """

    rate: Annotated[float, Field(ge=0)] = 0.001


class JitterSpec(Part):
    """In training, multiply by uniform noise in [1 - amount, 1 + amount): the router's `input` (Fedus et al. 2021,
    arXiv 2101.03961, section 2.2), which the experts get without noise, what the whole `mixture` sees (released code of
    Mixtral, MiniMax, Phi-3.5-MoE and DBRX), or the router's `logits` (tiny_moe)."""

    of: Literal["input", "mixture", "logits"] = "input"  # Trap: YAML reads a key `on` as true.
    amount: Annotated[float, Field(gt=0, lt=1)] = 0.01


class RouterSpec(Part):
    """Who chooses K of E experts for a token, and how the choice is weighted; a point in the router algebra.

    In the order of computation:

    - `input`: the `hidden` state, or `normalized`: divided by its root mean square (`input_epsilon` is added to the
      mean square), times a learned scale, over the root of D (Gemma 4). `gating_residual`: logits of the previous MoE
      layer, through a learned matrix, are added to this layer's (MoE++, arXiv 2410.07348, eq. 6); on the first MoE
      layer there is nothing to add.
    - `bias`: the linear map has one. `dtype` of its product: `float32` whatever the model computes in (Zoph et al.
      2022, arXiv 2202.08906), or `compute`.
    - logits are divided by `temperature`, then capped: `softcap * tanh(logit / softcap)`.
    - `score`: `softmax` over all experts, `sigmoid`, `sqrt_softplus` (DeepSeek-V4), or `none`: the logits themselves.
    - the selection value is the `score` or the `logits` (`select_on`), plus `selection_bias` if there is one; `choice`
      takes experts by it.
    - `weight` of a chosen expert: its `score`, or `softmax_of_chosen` or `sigmoid_of_chosen` logits.
    - `renormalize`: divide the K weights by their `sum`, or by their `p_norm` of order `renormalize_order` (DBRX).
      `renormalize_epsilon` is added to the divisor, or is the least it can be (`renormalize_floor`).
    - `scale` multiplies the weights, and `per_expert_scale` by a learned number for each expert (Gemma 4).
    - `apply_to`: the weight multiplies the expert's `output`, or its `input` (Llama-4).
    """

    top_k: PositiveInt
    input: Literal["hidden", "normalized"] = "hidden"
    input_epsilon: PositiveFloat = 1e-6
    gating_residual: bool = False
    bias: bool = False
    dtype: Literal["float32", "compute"] = "float32"
    temperature: PositiveFloat = 1.0
    softcap: PositiveFloat | None = None
    score: Literal["softmax", "sigmoid", "sqrt_softplus", "none"] = "softmax"
    select_on: Literal["score", "logits"] = "score"
    selection_bias: SelectionBiasSpec | None = None
    choice: ChoiceSpec = TopKChoiceSpec()
    weight: Literal["score", "softmax_of_chosen", "sigmoid_of_chosen"] = "score"
    renormalize: Literal["none", "sum", "p_norm"] = "sum"
    renormalize_order: Annotated[float, Field(ge=1)] = 1.0
    renormalize_epsilon: Annotated[float, Field(ge=0)] = 0.0
    renormalize_floor: bool = False
    scale: PositiveFloat = 1.0
    per_expert_scale: bool = False
    apply_to: Literal["output", "input"] = "output"
    jitter: JitterSpec | None = None

    @property
    def selection_basis(self) -> Literal["score", "logits"]:
        """What the selection value is made of.

        Every score keeps the order of a token's logits, and logits neither underflow nor saturate to ties. So they
        stand for the scores wherever nothing but that order decides: not with a bias, with sums over a group, or
        between tokens.
        """
        if self.select_on == "logits" or self.score == "none":
            return "logits"
        match self.choice:
            case ExpertChoiceSpec() | GroupedTopKChoiceSpec(group_value="top2"):
                return "score"
            case _:
                return "logits" if self.selection_bias is None else "score"

    @model_validator(mode="after")
    def _combinations(self) -> "RouterSpec":
        if isinstance(self.choice, TopPChoiceSpec) and self.score == "none":
            raise impossible(
                "choice",
                "is top_p, which adds up scores, but score is none",
                "Use score: softmax",
            )
        if self.score == "none" and self.weight == "score":
            raise impossible(
                "weight",
                "is score, but score is none, and a logit, which may be negative, is no weight",
                "Use weight: softmax_of_chosen or sigmoid_of_chosen, or another score",
            )
        if self.renormalize == "none" and self.renormalize_epsilon:
            raise impossible(
                "renormalize_epsilon",
                f"is {self.renormalize_epsilon}, but renormalize is none",
                "Leave it out, or use renormalize: sum",
            )
        if self.renormalize_floor and not self.renormalize_epsilon:
            raise impossible(
                "renormalize_floor",
                "is true, but renormalize_epsilon, the floor, is 0",
                "Leave it out, or give renormalize_epsilon",
            )
        if self.renormalize != "p_norm" and self.renormalize_order != 1:
            raise impossible(
                "renormalize_order",
                f"is {self.renormalize_order}, but renormalize is {self.renormalize}",
                "Leave it out, or use renormalize: p_norm",
            )
        return self
