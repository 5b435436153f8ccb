"""The router as data: a point in the algebra `input -> logits -> score -> choice -> weight`.

The router of a published model family is a combination of these fields and needs no code of its own
(writings/routing.md).
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, default_kind, impossible
from moezoo.core.spec.norms import NormSpec, RMSNormSpec

# --- choice: the experts chosen for each token -----------------------------------------------------------------------


class TopKChoiceSpec(Part):
    """The K experts with the highest selection value. Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3 and 5."""

    kind: Literal["top_k"] = "top_k"


class GroupedTopKChoiceSpec(Part):
    """Group-limited top-k: top-k among the experts of the `keep` best of `num_groups` groups of consecutive experts.

    A group is ranked by `group_value`: the `max` of its experts' values (DeepSeek-V2, arXiv 2405.04434, section 2.2.2:
    device-limited routing) or the sum of its `top2` (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Experts of `others`
    are `never` chosen, or count as if their value were `zero`: they are chosen before experts of kept groups whose
    biased score is negative, the first ones first (A.X-K2, transformers 5.23).
    """

    kind: Literal["grouped_top_k"] = "grouped_top_k"
    num_groups: PositiveInt
    keep: PositiveInt
    group_value: Literal["max", "top2"] = "max"
    others: Literal["never", "zero"] = "never"


class NoisyTopKChoiceSpec(Part):
    """Noisy top-k gating: in training, top-k of logits plus learned noise, `logit + normal() * softplus(x w_noise)`.

    The scores, and therefore the weights, are computed from the noisy logits. Without noise (inference) it is top-k.
    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5.
    """

    kind: Literal["noisy_top_k"] = "noisy_top_k"


class SparseMixerChoiceSpec(Part):
    """SparseMixer-v2: one or two experts, each sampled in training from a softmax over the logits near the maximum.

    Near: within `2 * jitter` of the maximum, relative to `max(|logit|, maximum)`. The weight is the sampled expert's
    probability in that softmax. If it is not the most probable one, its weight is divided by 3 with probability 3/4,
    while the gradient stays that of the undivided weight: Heun's third-order estimate of the gradient through the
    choice. The second expert is sampled in the same way from the remaining ones. Inference takes the argmax. The
    selection value is not used.

    Source: Liu et al. 2024 (GRIN), arXiv 2409.12136; the released code of Phi-3.5-MoE (transformers, `phimoe`).
    """

    kind: Literal["sparsemixer"] = "sparsemixer"
    jitter: PositiveFloat = 0.01


class TopPChoiceSpec(Part):
    """Top-p routing: the fewest experts, best first, whose scores sum to at least `p`, and at most top_k.

    The expert with which the sum reaches p is included. Source: Huang et al. 2024, arXiv 2403.07652. Differs: the upper
    bound top_k, which keeps shapes static.
    """

    kind: Literal["top_p"] = "top_p"
    p: Annotated[float, Field(gt=0, lt=1)]


class HashChoiceSpec(Part):
    """Hash routing: K distinct experts per token id, from a fixed table drawn from the seed.

    Each expert comes first for equally many ids. Weights still come from the router. Source: Roller et al. 2021, arXiv
    2106.04426 (random hash). Differs: their balanced table weights ids by frequency, ours does not.
    """

    kind: Literal["hash"] = "hash"


class ExpertChoiceSpec(Part):
    """Expert choice: in training each expert takes the `C = ceil(P * top_k / E)` tokens with the highest scores.

    Ties go to the earlier token. top_k is the mean number of experts per token; a token may get all E or none. This
    choice depends on later tokens and on other sequences, so it is not causal. Training therefore tracks an exponential
    moving average (`decay` per step) of each expert's cutoff, the lowest score it accepted, and at inference a token is
    routed to every expert whose cutoff its score reaches.
    Source: Zhou et al. 2022, arXiv 2202.09368, section 3.2; moving averages of cutoffs: Sun et al. 2026, arXiv
    2603.11535. Differs: they also choose by the cutoffs in training.
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
    """Auxiliary-loss-free load balancing: a bias per expert, added to the selection value only.

    After each step the bias changes by `+ rate` for experts below the mean load of the whole step and by `- rate` for
    those above. A rate of 0 keeps the loaded bias. Source: Wang et al. 2024, arXiv 2408.15664; DeepSeek-V3, arXiv
    2412.19437, section 2.1.2.
    """

    rate: Annotated[float, Field(ge=0)] = 0.001


class JitterSpec(Part):
    """Multiplicative router noise in training: uniform in [1 - amount, 1 + amount).

    It multiplies the router's `input` alone, not that of the experts (Fedus et al. 2021, arXiv 2101.03961, section
    2.2), the input of the whole MoE layer (`mixture`; released code of Mixtral, MiniMax, Phi-3.5-MoE and DBRX), or the
    router's `logits` (tiny_moe).
    """

    of: Literal["input", "mixture", "logits"] = "input"  # Trap: YAML reads a key `on` as true.
    amount: Annotated[float, Field(gt=0, lt=1)] = 0.01


class RouterMLPSpec(Part):
    """MLP before the router's matrix, with a state that may be averaged over depth.

    The state is `h = x w_down + b_down`, `hidden_dim` wide. With `depth_average` the state of the previous MoE layer,
    times a learned scale per feature, is added to it, and the sum is what the next one sees (exponential depth
    averaging); the first MoE layer has none to add. Two layers with exact GELU follow its `norm`, and their output is
    what the router's matrix multiplies. Source: Anthony et al. 2025 (ZAYA1), arXiv 2511.17127; transformers 5.23, zaya.
    """

    hidden_dim: PositiveInt
    depth_average: bool = False
    norm: NormSpec = RMSNormSpec()


class RouterSpec(Part):
    """Router that chooses K of E experts for each token and weights them; a point in the router algebra.

    In order of computation:

    - `input`: the `hidden` state, or `normalized`: divided by its root mean square (`input_epsilon` is added to the
      mean square), times a learned scale, divided by sqrt(D) (Gemma 4). `mlp`: the router's matrix multiplies the
      output of a small network of it instead (ZAYA1). `gating_residual`: the previous MoE layer's logits, multiplied by
      a learned matrix, are added to this layer's (MoE++, arXiv 2410.07348, eq. 6); the first MoE layer has none to add.
    - `product_keys`: the router's matrix has 2 sqrt(E) columns in place of E, and the logit of expert e is the sum of
      number `e // sqrt(E)` of the first half of its outputs and number `e % sqrt(E)` of the second (Lample et al. 2019,
      arXiv 1907.05242; PEER, He 2024, arXiv 2407.04153; Doge).
    - `bias`: the router's linear layer has one. `dtype` of its matrix product: `float32` regardless of the model's
      compute dtype (Zoph et al. 2022, arXiv 2202.08906), or `compute`.
    - logits are divided by `temperature`, then capped: `softcap * tanh(logit / softcap)`.
    - `score`: `softmax` over all experts, `sigmoid`, `sqrt_softplus` (DeepSeek-V4), or `none`: the logits themselves.
    - the selection value is the `score` or the `logits` (`select_on`), plus `selection_bias` if there is one; `choice`
      selects experts by it.
    - `weight` of a chosen expert: its `score`, or `softmax_of_chosen` or `sigmoid_of_chosen` logits.
    - `renormalize`: divide the K weights by their `sum`, or by their `p_norm` of order `renormalize_order` (DBRX).
      `renormalize_epsilon` is added to the divisor, or is its lower bound (`renormalize_floor`).
    - `scale` multiplies the weights, and so does `learned_scale`, a learned number that starts at 1 (Inkling);
      `per_expert_scale` multiplies them by a learned scale per expert (Gemma 4).
    - `apply_to`: the weight multiplies the expert's `output`, or its `input` (Llama-4).
    """

    top_k: PositiveInt
    input: Literal["hidden", "normalized"] = "hidden"
    input_epsilon: PositiveFloat = 1e-6
    mlp: RouterMLPSpec | None = None
    gating_residual: bool = False
    product_keys: bool = False
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
    learned_scale: bool = False
    per_expert_scale: bool = False
    apply_to: Literal["output", "input"] = "output"
    jitter: JitterSpec | None = None

    @property
    def reads_previous(self) -> bool:
        """True if it takes something from the router of the previous MoE layer: its logits, or the state of its MLP."""
        return self.gating_residual or (self.mlp is not None and self.mlp.depth_average)

    @property
    def selection_basis(self) -> Literal["score", "logits"]:
        """The values that the selection is computed from: scores, or logits wherever they give the same order.

        Every score function preserves the order of a token's logits, and logits neither underflow nor saturate to
        ties. So logits replace the scores wherever only that order matters: not with a bias, with sums over a group,
        or in a comparison between tokens or with zero.
        """
        if self.select_on == "logits" or self.score == "none":
            return "logits"
        match self.choice:
            case ExpertChoiceSpec() | GroupedTopKChoiceSpec(group_value="top2") | GroupedTopKChoiceSpec(others="zero"):
                return "score"
            case _:
                return "logits" if self.selection_bias is None else "score"

    @model_validator(mode="after")
    def _combinations(self) -> "RouterSpec":
        if isinstance(self.choice, TopPChoiceSpec) and self.score == "none":
            raise impossible(
                "choice",
                "is top_p, which sums scores, but score is none",
                "Use score: softmax",
            )
        if self.score == "none" and self.weight == "score":
            raise impossible(
                "weight",
                "is score, but score is none, and logits may be negative, so they cannot be weights",
                "Use weight: softmax_of_chosen or sigmoid_of_chosen, or another score",
            )
        if self.renormalize == "none" and self.renormalize_epsilon:
            raise impossible(
                "renormalize_epsilon",
                f"is {self.renormalize_epsilon}, but renormalize is none",
                "Remove it, or use renormalize: sum",
            )
        if self.renormalize_floor and not self.renormalize_epsilon:
            raise impossible(
                "renormalize_floor",
                "is true, but renormalize_epsilon, the lower bound, is 0",
                "Remove it, or set renormalize_epsilon above 0",
            )
        if self.renormalize != "p_norm" and self.renormalize_order != 1:
            raise impossible(
                "renormalize_order",
                f"is {self.renormalize_order}, but renormalize is {self.renormalize}",
                "Remove it, or use renormalize: p_norm",
            )
        return self
