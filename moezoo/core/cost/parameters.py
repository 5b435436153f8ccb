"""Parameter counts by role, total and active. Writing: writings/cost.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from moezoo.core.parameters import ROLES, Role, parameter_table
from moezoo.core.spec import (
    ModelSpec,
    MoESpec,
)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, in the order of ROLES, roles that the model lacks included with 0.

    Fields:
        by_role: every parameter of the role.
        active_by_role: those that one token uses.
    """

    by_role: Mapping[Role, int]
    active_by_role: Mapping[Role, int]

    @property
    def total(self) -> int:
        """Every parameter."""
        return sum(self.by_role.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return sum(self.active_by_role.values())


def parameter_counts(spec: ModelSpec) -> ParameterCounts:
    """Total and active parameters: `active = stacked experts * active_experts / E + everything else`.

    Embeddings (the table, and the head where it is untied) count whole in both numbers, a tied matrix once. So do
    `norms` and a router's state. Routed experts count as if no capacity dropped anything. Raises SpecError while
    vocab_size is null.

    Source: active parameters as Jiang et al. 2024, arXiv 2401.04088, section 2 counts them.
    Differs: Kaplan et al. 2020, arXiv 2001.08361, leave embeddings out of N; subtract `by_role["embeddings"]` for that.
    """
    total: dict[Role, int] = dict.fromkeys(ROLES, 0)
    active: dict[Role, int] = dict.fromkeys(ROLES, 0)
    layers = spec.all_layers
    for row in parameter_table(spec):
        total[row.role] += row.size
        used = Fraction(row.size)
        if row.role == "routed experts" and ".experts." in row.name:
            moe = layers[int(row.name.split(".")[1])].moe
            assert moe is not None
            used = row.size * active_experts(moe) / moe.num_experts
        active[row.role] += round(used)
    return ParameterCounts(total, active)


def active_experts(moe: MoESpec) -> Fraction:
    """How many experts with a feed-forward a token uses: K; with top_p at most K, and with expert choice K on average.

    With Z zero-computation experts it is the share that capacity and loss aim at: `K tau E / (tau E + Z)`.
    """
    top_k = Fraction(moe.router.top_k)
    if moe.zero_computation is None:
        return top_k
    tau = Fraction(str(moe.zero_computation.ffn_share))
    return top_k * tau * moe.num_experts / (tau * moe.num_experts + moe.zero_computation.num_experts)
