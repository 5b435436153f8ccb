"""Dispatch sorts token-expert assignments by expert; combine sums the expert outputs of each token."""

import math
from fractions import Fraction
from typing import NamedTuple

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.reference import Array
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import CapacitySpec, ExpertChoiceSpec, MoESpec, TopPChoiceSpec


class Dispatch(NamedTuple):
    """Dispatched tokens, R rows for the E feed-forward experts: sorted by expert, then by token; unused rows are last.

    R does not depend on the routing (`num_rows`). Only the first `sum(size_E)` rows need to be computed.

    Fields:
        token_R: int, the token of each row; a valid token in unused rows too.
        expert_R: int, ascending, below E.
        weight_R: combine weight; 0 for an unused row.
        size_E: int, rows of each expert.
        kept_PK: bool, slots of the routing that are not dropped, including those of zero-computation experts.
    """

    token_R: Array
    expert_R: Array
    weight_R: Array
    size_E: Array
    kept_PK: Array


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


def num_dropped(routing: Routing, dispatched: Dispatch) -> Array:
    """Return the number of token-expert assignments dropped by the capacities."""
    return np.sum(routing.valid_PK & ~dispatched.kept_PK)


def kept_slots(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> Array:
    """Return the assignments that are not dropped: bool [P, K]. An expert keeps the first of its tokens in each group.

    It keeps as many as `capacities` allows. First are the earliest tokens, or with `priority: score` those with the
    highest weight, ties to the earlier token.

    Args:
        spec: the MoE layer.
        routing: the routing of P tokens, sequence by sequence.
        num_sequences: number of sequences, all of the same length.
        inference: nothing is dropped in inference.

    Source: Riquelme et al. 2021 (V-MoE), arXiv 2106.05974, section 3.4 (batch prioritized routing).
    Differs: in the paper, tokens are ordered by their highest weight, and all first choices precede any second choice.
    Here each expert orders its own tokens by their weight for it.
    """
    groups = num_groups(spec, num_sequences)
    group_size = routing.expert_PK.shape[0] // groups
    limits = capacities(spec, group_size, inference=inference)
    order = np.arange(routing.expert_PK.size)
    if isinstance(spec.dispatch, CapacitySpec) and spec.dispatch.priority == "score":
        order = np.argsort(-getval(routing.weight_PK).reshape(-1), kind="stable")
    kept_PK, served = np.zeros(routing.expert_PK.shape, bool), np.zeros((groups, len(limits)), int)
    for token, choice in zip(*np.unravel_index(order, kept_PK.shape), strict=True):
        queue = token // group_size, routing.expert_PK[token, choice]
        if routing.valid_PK[token, choice] and served[queue] < limits[queue[1]]:
            kept_PK[token, choice] = True
            served[queue] += 1
    return kept_PK


def dispatch(spec: MoESpec, routing: Routing, *, num_sequences: int = 1, inference: bool = False) -> Dispatch:
    """Sort the kept token-expert assignments by expert; those of zero-computation experts get no row.

    Args: as `kept_slots`.

    Source: Gale et al. 2022, arXiv 2211.15841 (sorted, dropless); Fedus et al. 2021, arXiv 2101.03961 (capacity).
    """
    num_tokens = routing.expert_PK.shape[0]
    kept_PK = kept_slots(spec, routing, num_sequences=num_sequences, inference=inference)
    token_R, choice_R = np.nonzero(kept_PK & (routing.expert_PK < spec.num_experts))
    order_R = np.argsort(routing.expert_PK[token_R, choice_R], kind="stable")
    token_R, choice_R = token_R[order_R], choice_R[order_R]
    expert_R, weight_R = routing.expert_PK[token_R, choice_R], routing.weight_PK[token_R, choice_R]
    size_E = np.array([np.sum(expert_R == expert) for expert in range(spec.num_experts)])
    unused = num_rows(spec, num_tokens, num_sequences=num_sequences, inference=inference) - len(expert_R)
    return Dispatch(
        np.concatenate([token_R, np.zeros(unused, int)]),
        np.concatenate([expert_R, np.full(unused, spec.num_experts - 1)]),
        np.concatenate([weight_R, np.zeros(unused)]),
        size_E,
        kept_PK,
    )


def used_rows(dispatched: Dispatch) -> Array:
    """Return 1 for each used row and 0 for each unused row: [R]."""
    return (np.arange(len(dispatched.token_R)) < np.sum(dispatched.size_E)).astype(float)


def combine(dispatched: Dispatch, y_RD: Array, num_tokens: int) -> Array:
    """Combine: `out[p] = sum over used rows r of token p of weight_R[r] * y_RD[r]`, in float32: [P, D]."""
    used = np.sum(dispatched.size_E)
    belongs_PR = (np.arange(num_tokens)[:, None] == dispatched.token_R[None, :used]).astype(float)
    return np.einsum("PR,R,RD->PD", belongs_PR, dispatched.weight_R[:used], y_RD[:used])
