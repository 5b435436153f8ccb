"""Static sizes of dispatch: groups, capacities and rows, from the spec and the number of tokens alone.

The reference and both backends use them, and so do sharding and cost: none of them depends on a routing.
"""

import math
from fractions import Fraction

from moezoo.core.spec import CapacitySpec, ExpertChoiceSpec, MoESpec, TopPChoiceSpec


def num_groups(spec: MoESpec, num_sequences: int) -> int:
    """Return the number of groups of tokens with separate capacities: one per sequence, or one per batch.

    Source: Lepikhin et al. 2020, GShard, arXiv 2006.16668, section 2.2. Differs: there, one group per device.
    """
    by_sequence = isinstance(spec.dispatch, CapacitySpec) and spec.dispatch.group == "sequence"
    return num_sequences if by_sequence else 1


def capacities(spec: MoESpec, num_tokens: int, *, inference: bool = False) -> list[int]:
    """Return the capacity of each expert for a group of P tokens: one number for each of the router's E + Z choices.

    - `capacity`: `ceil(factor * K * P / E)`. With Z zero-computation experts, each of which may take 1 token where a
      feed-forward expert may take tau (`ffn_share`): `ceil(u)` for the former and `ceil(tau * u)` for the latter, with
      `u = factor * K * P / (tau * E + Z)`, so that they sum to `factor * K * P` up to rounding.
    - expert choice in training: `ceil(K * P / E)`, the number of tokens that each expert takes; K is the mean over
      tokens.
    - P otherwise, and in inference.

    Source: Fedus et al. 2021, arXiv 2101.03961, section 2.2; Jin et al. 2024 (MoE++), arXiv 2410.07348, eq. 8.
    Differs: eq. 8 has T in place of K * P, so that with K = 2 and its gamma of 1.1 nearly half of the assignments
    would be dropped.
    """
    num_zero = spec.num_choices - spec.num_experts
    assignments = num_tokens * spec.router.top_k
    most_ffn = most_zero = num_tokens
    if not inference and isinstance(spec.router.choice, ExpertChoiceSpec):
        most_ffn = math.ceil(Fraction(assignments, spec.num_experts))
    elif not inference and isinstance(spec.dispatch, CapacitySpec):
        # Exact decimals: 1.1 * 100 / 5 is 22, and not slightly more.
        factor = Fraction(str(spec.dispatch.factor))
        share = Fraction(1) if spec.zero_computation is None else Fraction(str(spec.zero_computation.ffn_share))
        unit = factor * assignments / (share * spec.num_experts + num_zero)
        most_ffn, most_zero = math.ceil(share * unit), math.ceil(unit)
    return [min(most_ffn, num_tokens)] * spec.num_experts + [min(most_zero, num_tokens)] * num_zero


def num_rows(spec: MoESpec, num_tokens: int, *, num_sequences: int = 1, inference: bool = False) -> int:
    """Return R, the maximum number of rows that P tokens can fill, given their slots and the capacities."""
    slots = spec.num_experts if isinstance(spec.router.choice, ExpertChoiceSpec) else spec.router.top_k
    groups = num_groups(spec, num_sequences)
    capacity = groups * sum(capacities(spec, num_tokens // groups, inference=inference)[: spec.num_experts])
    return min(num_tokens * slots, capacity)


def mostly_unused(spec: MoESpec, *, inference: bool = False) -> bool:
    """Return True if many of the R rows may be unused.

    That is without a capacity limit, where slots may be unused or go to zero-computation experts.
    """
    limited = not inference and isinstance(spec.dispatch, CapacitySpec)
    variable = isinstance(spec.router.choice, TopPChoiceSpec) or (
        isinstance(spec.router.choice, ExpertChoiceSpec) and inference
    )
    return not limited and (variable or spec.zero_computation is not None)


def has_variable_rows(spec: MoESpec) -> bool:
    """Return True if the routing decides how many of the R rows are used in training."""
    return isinstance(spec.dispatch, CapacitySpec) or mostly_unused(spec)
