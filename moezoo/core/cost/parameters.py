"""Parameter counts by role, total and active. Writing: writings/cost.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moezoo.core.parameters import ROLES, Parameter, Role, parameter_table
from moezoo.core.spec import LayerSpec, ModelSpec, MoESpec


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by role, in the order of ROLES; 0 for a role that the model does not have.

    Fields:
        by_role: all parameters of the role.
        active_by_role: parameters that one token uses.
    """

    by_role: Mapping[Role, int]
    active_by_role: Mapping[Role, int]

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return sum(self.by_role.values())

    @property
    def active(self) -> int:
        """Number of parameters that one token uses."""
        return sum(self.active_by_role.values())


def parameter_counts(spec: ModelSpec) -> ParameterCounts:
    """Return total and active parameters: `active = stacked experts * active_experts / E + all others`.

    Both numbers include all embeddings (the table, and an untied head; a tied matrix counts once), norms and router
    state; but of the tables of n-gram embeddings, only the rows that a token looks up are active. Active experts are
    counted without capacity drops. Raises SpecError: vocab_size is null.

    Source: active parameters as counted in Jiang et al. 2024, arXiv 2401.04088, section 2.
    Differs: Kaplan et al. 2020, arXiv 2001.08361, exclude embeddings from N; subtract `by_role["embeddings"]` for that.
    """
    total: dict[Role, int] = dict.fromkeys(ROLES, 0)
    active: dict[Role, int] = dict.fromkeys(ROLES, 0)
    layers = spec.all_layers
    for row in parameter_table(spec):
        total[row.role] += row.size
        active[row.role] += round(used_parameters(row, layers))
    return ParameterCounts(total, active)


def used_parameters(row: Parameter, layers: Sequence[LayerSpec]) -> Fraction:
    """Return how many numbers of a parameter one token uses: of its experts, its n-grams, or its chosen heads."""
    if is_routed(row):
        moe = layers[int(row.name.split(".")[1])].moe
        assert moe is not None
        return row.size * active_experts(moe) / moe.num_experts
    if row.name.endswith(".ngram_embeddings.weight"):
        ngrams = layers[int(row.name.split(".")[1])].ngram_embeddings
        assert ngrams is not None
        return Fraction(ngrams.dim)
    if row.name.endswith((".attention.w_query", ".attention.w_output")):
        return row.size * layers[int(row.name.split(".")[1])].head_share
    return Fraction(row.size)


def is_routed(row: Parameter) -> bool:
    """Return True for a parameter that stacks those of the routed experts."""
    return row.role == "routed experts" and ".experts." in row.name


def active_experts(moe: MoESpec) -> Fraction:
    """Return the number of feed-forward experts per token: K; an upper bound for top_p, an average for expert choice.

    With Z zero-computation experts it is the expected share that capacity and loss target: `K tau E / (tau E + Z)`.
    """
    top_k = Fraction(moe.router.top_k)
    if moe.zero_computation is None:
        return top_k
    tau = Fraction(str(moe.zero_computation.ffn_share))
    return top_k * tau * moe.num_experts / (tau * moe.num_experts + moe.zero_computation.num_experts)
